"""What a run says of itself: metrics.jsonl, the progress line, and Weights & Biases."""

from __future__ import annotations

import json
import logging
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from dense2conv.models import DenseStack
from dense2conv.models.dense_stack import layer_name
from dense2conv.objectives import Terms
from dense2conv.parallel import Mesh
from dense2conv.shapes import InputError
from dense2conv.training.run_folder import RunFolder

log = logging.getLogger(__name__)

_DEAD_WARNING = 0.2  # share of dead units in the first part of a run that is worth a word


@dataclass
class LogConfig:
    """How often a run speaks."""

    every: int = field(default=25, metadata={"help": "write metrics every so many steps"})
    radius_every: int = field(
        default=50, metadata={"help": "measure the receptive fields every so many steps"}
    )
    num_fields: int = field(
        default=256,
        metadata={"help": "receptive fields a snapshot keeps, evenly spaced over units"},
    )

    def validate(self) -> None:
        """Raise InputError for an interval under 1."""
        for name in ("every", "radius_every", "num_fields"):
            if getattr(self, name) < 1:
                raise InputError(f"log.{name}={getattr(self, name)}; use 1 or more")


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: str = field(default="offline", metadata={"help": "online | offline | disabled"})
    project: str = field(default="dense2conv", metadata={"help": "W&B project"})
    group: str | None = field(default=None, metadata={"help": "W&B group"})
    tags: list[str] = field(default_factory=list, metadata={"help": "W&B tags"})

    def validate(self) -> None:
        """Raise InputError for an unknown mode."""
        if self.mode not in ("online", "offline", "disabled"):
            raise InputError(
                f"wandb.mode={self.mode!r} is unknown; use online, offline or disabled"
            )


def layer_metrics(
    mesh: Mesh, stack: DenseStack, terms: Mapping[str, Terms], l1: float
) -> dict[str, Tensor]:
    """Device scalars of the held layers, exact over the tensor-parallel group.

    ``rate``, ``power``, ``l1`` and ``objective`` = rate − power − l1 are in nats a unit;
    ``sparsity`` and ``dead`` are shares of weights that are exactly 0 and of units that have none
    left. Keys of layers after the first start with ``layer2/`` and so on; in the network scope the
    top layer's rate, power and objective are the run's and stand under their plain names too.
    """
    values: dict[str, Tensor] = {}
    for i in stack.indices:
        weight, d = stack.layer(i).weight.detach(), stack.layer(i).num_units
        # Norms along rows make no copy of the weights, as comparisons and sums to fp64 do.
        nonzero = torch.linalg.vector_norm(weight, 0, dim=1).double()  # (d/tp,)
        magnitude = torch.linalg.vector_norm(weight, 1, dim=1).double()
        counts = torch.stack([nonzero.sum(), (nonzero == 0).sum(), magnitude.sum()])
        counts = mesh.tp.sum(counts)
        prefix = "" if i == 0 else f"{layer_name(i)}/"
        values[f"{prefix}sparsity"] = 1 - counts[0] / (d * weight.shape[1])
        values[f"{prefix}dead"] = counts[1] / d
        values[f"{prefix}l1"] = l1 * counts[2] / d
        if layer_name(i) in terms:
            rate, power = terms[layer_name(i)]
            values[f"{prefix}rate"], values[f"{prefix}power"] = rate, power
            values[f"{prefix}objective"] = rate - power - values[f"{prefix}l1"]
    top = layer_name(stack.num_layers - 1)
    if stack.num_layers > 1 and terms.keys() == {top}:
        # One objective, that of the top layer; where there are more, the first stage's stands.
        values |= {key: values[f"{top}/{key}"] for key in ("rate", "power", "objective")}
    return values


class MetricsLog:
    """Collects every stage's metrics, joins them by step on rank 0 and writes them.

    Args:
        mesh: the mesh; one process of each pipeline stage records.
        folder: the run's folder.
        first_step: where this process's part of the run begins; later lines of an earlier, killed
        part are
            dropped.
        num_steps: of the whole run, for the progress display.
        sinks: further places for each step's metrics, such as W&B.
    """

    def __init__(
        self,
        mesh: Mesh,
        folder: RunFolder,
        first_step: int,
        num_steps: int,
        sinks: list[Callable[[int, dict[str, float]], None]],
    ) -> None:
        self._mesh, self._sinks = mesh, sinks
        self._rows: list[tuple[int, dict[str, Tensor | float]]] = []
        self._file: TextIO | None = None
        self._progress: Progress | None = None
        self._warned = False
        self._num_steps = num_steps
        self._start = time.monotonic()
        if mesh.is_main:
            _keep_steps_until(folder, first_step)
            self._file = folder.metrics.open("a")
            self._progress = Progress(first_step, num_steps)

    def record(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Keep one step's values, on the device until the next flush."""
        if self._mesh.writes_shards:
            self._rows.append((step, dict(values)))
        if self._progress is not None:
            self._progress.advance()

    def flush(self) -> None:
        """Join the stages' metrics and write them; every process calls this at the same steps."""
        if not self._mesh.writes_shards:
            return
        rows = _to_floats(self._rows)
        self._rows = []
        parts = self._mesh.join_stages(rows)
        if parts is None:
            return
        for same_step in zip(*parts, strict=True):
            step = same_step[0][0]
            assert all(other == step for other, _ in same_step)
            values = {k: v for _, part in reversed(same_step) for k, v in part.items()}
            self._write(step, values)
        assert self._file is not None
        self._file.flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        self.flush()
        if self._file is not None:
            self._file.close()
        if self._progress is not None:
            self._progress.close()

    def _write(self, step: int, values: dict[str, float]) -> None:
        assert self._file is not None
        assert self._progress is not None
        values = {"time": round(time.monotonic() - self._start, 3), **values}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for sink in self._sinks:
            sink(step, values)
        self._progress.show(values)
        dead = {k: v for k, v in values.items() if k.endswith("dead") and v > _DEAD_WARNING}
        if dead and not self._warned and step < self._num_steps // 2:
            self._warned = True
            self._progress.say(
                f"warning: {max(dead.values()):.0%} of the units of a layer are dead at step {step}; lower "
                "objective.l1 (or optimizer.lr) if that is not what you want"
            )


def _to_floats(
    rows: list[tuple[int, dict[str, Tensor | float]]],
) -> list[tuple[int, dict[str, float]]]:
    """All device scalars in one copy."""
    tensors = [v.double() for _, row in rows for v in row.values() if isinstance(v, Tensor)]
    floats = iter(torch.stack(tensors).tolist() if tensors else [])
    return [
        (step, {k: next(floats) if isinstance(v, Tensor) else v for k, v in row.items()})
        for step, row in rows
    ]


def _keep_steps_until(folder: RunFolder, last_step: int) -> None:
    """Drop lines that the resumed run will write again, and a last line that a kill cut off."""
    if not folder.metrics.exists():
        return
    kept = []
    for line in folder.metrics.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    folder.metrics.write_text("".join(kept))


class Progress:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, first_step: int, num_steps: int) -> None:
        self._live = sys.stderr.isatty()
        self._bar = tqdm(
            total=num_steps,
            initial=first_step,
            desc="training",
            unit="step",
            disable=not self._live,
            dynamic_ncols=True,
        )
        self._step, self._num_steps = first_step, num_steps
        self._next_line = first_step
        self._values: dict[str, float] = {}

    def advance(self) -> None:
        self._step += 1
        self._bar.update()

    def show(self, values: dict[str, float]) -> None:
        """The newest rate, sparsity and radius."""
        self._values |= {
            k: values[k] for k in ("rate", "objective", "sparsity", "radius") if k in values
        }
        if self._live:
            self._bar.set_postfix({k: f"{v:.3f}" for k, v in self._values.items()}, refresh=False)
        elif self._step >= self._next_line:
            self._next_line = self._step + max(1, self._num_steps // 10)
            figures = "  ".join(f"{k} {v:.3f}" for k, v in self._values.items())
            self.say(f"step {self._step}/{self._num_steps}  {figures}")

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


class WandbLog:
    """Weights & Biases on rank 0; whatever goes wrong there never stops a run."""

    def __init__(
        self, config: WandbConfig, folder: RunFolder, name: str, run: dict[str, Any]
    ) -> None:
        self._run: Any = None
        if config.mode == "disabled":
            return
        identity = folder.path / "wandb_id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        with self._forgiving("start"):
            import wandb

            self._run = wandb.init(
                project=config.project,
                group=config.group,
                tags=config.tags,
                name=name,
                id=identity.read_text().strip(),
                resume="allow",
                dir=str(folder.path),
                mode=config.mode,  # type: ignore[arg-type]
                config=run,
                settings=wandb.Settings(silent=True, console="off", x_disable_meta=True),
            )
            # Resuming offline restarts W&B's own step, so ours is the axis.
            self._run.define_metric("*", step_metric="train/step")

    def __call__(self, step: int, values: dict[str, float]) -> None:
        with self._forgiving("log"):
            if self._run is not None:
                self._run.log({"train/step": step, **{f"train/{k}": v for k, v in values.items()}})

    def images(self, step: int, pictures: Mapping[str, Any]) -> None:
        """Log PIL images by name."""
        with self._forgiving("log a picture"):
            if self._run is not None:
                import wandb

                named = {name: wandb.Image(picture) for name, picture in pictures.items()}
                self._run.log({"train/step": step, **named})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Put the run's final figures in its summary."""
        with self._forgiving("write the summary"):
            if self._run is not None:
                self._run.summary.update(
                    {k: v for k, v in values.items() if isinstance(v, int | float | str)}
                )

    def close(self) -> None:
        with self._forgiving("finish"):
            if self._run is not None:
                self._run.finish()

    def _forgiving(self, what: str) -> _Forgiving:
        return _Forgiving(what)


class _Forgiving:
    """Turns an exception into one warning."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> bool:
        if kind is None or not issubclass(kind, Exception):
            return False
        log.warning(
            "W&B could not %s: %s; the run goes on, metrics.jsonl is complete", self._what, error
        )
        return True
