"""What a run says of itself: metrics.jsonl always, and whoever else listens: W&B, TensorBoard.

``METRICS`` is the glossary of everything that is logged.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dense2conv.files import write_atomically
from dense2conv.parallel import Mesh
from dense2conv.shapes import InputError
from dense2conv.training.measures import Fields, Histogram, Value
from dense2conv.training.progress import Progress
from dense2conv.training.run_folder import RunFolder

log = logging.getLogger(__name__)


class Metric(NamedTuple):
    """What a logged key means; W&B and TensorBoard show it in the section ``panel``."""

    unit: str
    meaning: str
    panel: str = "train"


METRICS = {
    "step": Metric("steps", "optimizer steps done; the axis of everything else"),
    "time": Metric("s", "since this process began to train"),
    "objective": Metric("nats a unit", "rate − power − l1 of the batch, which training maximises"),
    "rate": Metric("nats a unit", "coding rate R of the batch: information about the image"),
    "power": Metric("nats a unit", "(μ/2) E‖z‖², the price of the units' power"),
    "l1": Metric("nats a unit", "λ‖W‖₁, the price of the weights' magnitudes"),
    "lambda": Metric(
        "nats", "λ, price of a weight's magnitude, where objective.sparsity steers it"
    ),
    "sparsity": Metric("share", "weights that are exactly 0"),
    "dead": Metric("share", "units without a weight that is not 0"),
    "radius": Metric("pixels", "median radius of the first layer's receptive fields"),
    "lr": Metric("1", "learning rate of the step"),
    "steps_per_second": Metric("1/s", "since the metrics were written before", "speed"),
    "images_per_second": Metric("1/s", "of the whole mesh, in the same time", "speed"),
    "tflops": Metric(
        "10¹² a second", "products with the weights, forward and backward, of the mesh", "speed"
    ),
    "input_share": Metric("share", "of the step: waiting for images, sharing and noise", "speed"),
    "utilisation": Metric(
        "share", "of the step in which a pipeline stage did not wait for another (CPU)", "speed"
    ),
    "magnitudes": Metric("log₁₀|w|", "histogram of a layer's weights that are not 0", "weights"),
    "radii": Metric("pixels", "histogram of the first layer's radii, live units", "weights"),
    "fields": Metric("picture", "receptive fields of 64 units, evenly spaced", "weights"),
    "pruned_fields": Metric("picture", "the same behind pruning", "weights"),
    "kernels": Metric("picture", "a layer's kernels, found by extraction", "weights"),
}


def metric(key: str) -> Metric:
    """The glossary's entry of a logged key such as ``layer2/rate``.

    Raises:
        KeyError: it has none.
    """
    return METRICS[re.sub(r"^(layer|stage)\d+/", "", key)]


def glossary() -> list[str]:
    """A line a metric: key, unit, meaning."""
    keys, units = (
        max(map(len, column)) for column in (METRICS, [m.unit for m in METRICS.values()])
    )
    return [f"{key:{keys}}  {m.unit:{units}}  {m.meaning}" for key, m in METRICS.items()]


Draw = Callable[[NDArray[np.float32]], Image.Image]  # of receptive fields (n, D)


class Sink(Protocol):
    """Someone on rank 0 who listens; whatever goes wrong there never stops a run."""

    def __call__(self, step: int, values: Mapping[str, Value]) -> None:
        """Take one step's values."""

    def catch_up(self, rows: list[dict[str, float]]) -> None:
        """Take the scalars of an earlier part of the run, by ``step``, as far as they may have got lost."""

    def alert(self, text: str) -> None:
        """Take a warning that is worth somebody's attention."""

    def close(self) -> None:
        """Everything has been said."""


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
    dead_alarm: float = field(
        default=0.2, metadata={"help": "warn once when more than this share of a layer is dead"}
    )

    def validate(self) -> None:
        """Raise InputError for an interval under 1, or a share that is none."""
        for name in ("every", "radius_every", "num_fields"):
            if getattr(self, name) < 1:
                raise InputError(f"log.{name}={getattr(self, name)}; use 1 or more")
        if not 0 <= self.dead_alarm <= 1:
            raise InputError(
                f"log.dead_alarm={self.dead_alarm} is no share; use 0 to 1, 1 for no alarm"
            )


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


class MetricsLog:
    """Collects every stage's metrics, joins them by step on rank 0 and writes them.

    Args:
        mesh: the mesh; one process of each pipeline stage records.
        folder: the run's folder.
        first_step: where this process's part of the run begins; later lines of an earlier, killed
            part are dropped.
        num_steps: of the whole run, for the progress display.
        sinks: who else hears of it, on rank 0.
        batch: images of a step.
        flops: of an image.
        dead_alarm: share of a layer's units above which a warning is given, once.
    """

    def __init__(
        self,
        mesh: Mesh,
        folder: RunFolder,
        first_step: int,
        num_steps: int,
        sinks: list[Sink],
        batch: int,
        flops: float,
        dead_alarm: float,
    ) -> None:
        self._mesh, self._sinks, self._batch, self._flops = mesh, sinks, batch, flops
        self._rows: list[tuple[int, dict[str, Tensor | Value]]] = []
        self._file: FileIO | None = None
        self._unwritten = b""
        self._warned = False
        self._progress: Progress | None = None
        self._dead_alarm: float = dead_alarm
        self._start = self._written = time.monotonic()
        self._step = first_step
        if mesh.is_main:
            rows = _keep_steps_until(folder, first_step)
            for sink in sinks:
                sink.catch_up(rows)
            self._file = FileIO(folder.metrics, "a")
            self._progress = Progress(first_step, num_steps)

    def record(self, step: int, values: Mapping[str, Tensor | Value]) -> None:
        """Keep one step's values, scalars on the device until the next flush."""
        if self._mesh.writes_shards:
            self._rows.append((step, dict(values)))
        if self._progress is not None:
            self._progress.at(step)

    def flush(self) -> None:
        """Join the stages' metrics and write them; every process calls this at the same steps."""
        if not self._mesh.writes_shards:
            return
        rows = _to_floats(self._rows)
        self._rows = []
        parts = self._mesh.join_stages(rows)
        if parts is None:
            return
        joined: list[tuple[int, dict[str, Value]]] = []
        for same_step in zip(*parts, strict=True):
            step = same_step[0][0]
            assert all(other == step for other, _ in same_step)
            joined.append(
                (step, {k: v for _, part in reversed(same_step) for k, v in part.items()})
            )
        if joined and joined[-1][0] > self._step:
            joined[-1][1].update(self._speed(joined[-1][0]))
        for step, values in joined:
            self._write(step, values)
        self._save()

    def close(self) -> None:
        """Write what is left and close the file."""
        self.flush()
        if self._file is not None:
            self._file.close()
        if self._progress is not None:
            self._progress.close()

    def _save(self) -> None:
        """What a full disk does not take is kept, and tried again at the next flush."""
        assert self._file is not None
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._warned and self._progress is not None:
                self._progress.say(
                    f"warning: {self._file.name} cannot be written: {error.strerror}; make room, its "
                    "rows are kept until then"
                )
            self._warned = True

    def _speed(self, step: int) -> dict[str, Value]:
        now = time.monotonic()
        rate = (step - self._step) / (now - self._written)
        self._step, self._written = step, now
        images = rate * self._batch
        return {
            "steps_per_second": rate,
            "images_per_second": images,
            "tflops": images * self._flops / 1e12,
        }

    def _write(self, step: int, values: dict[str, Value]) -> None:
        assert self._progress is not None
        values = {"time": round(time.monotonic() - self._start, 3), **values}
        scalars = {k: v for k, v in values.items() if isinstance(v, float)}
        if scalars.keys() != {"time"}:
            self._unwritten += json.dumps({"step": step, **scalars}).encode() + b"\n"
            self._progress.show(step, scalars)
        for sink in self._sinks:
            sink(step, values)
        worst = max((v for k, v in scalars.items() if k.endswith("dead")), default=0.0)
        if worst > self._dead_alarm:
            text = (
                f"{worst:.0%} of the units of a layer are dead at step {step}, more than log.dead_alarm="
                f"{self._dead_alarm:g}; lower objective.l1, objective.sparsity or optimizer.lr if that is "
                "not what you want"
            )
            self._dead_alarm = 1.0  # once is enough
            self._progress.say(f"warning: {text}")
            for sink in self._sinks:
                sink.alert(text)


def _to_floats(
    rows: list[tuple[int, dict[str, Tensor | Value]]],
) -> list[tuple[int, dict[str, Value]]]:
    """All device scalars in one copy."""
    tensors = [v.double() for _, row in rows for v in row.values() if isinstance(v, Tensor)]
    floats = iter(torch.stack(tensors).tolist() if tensors else [])
    return [
        (step, {k: next(floats) if isinstance(v, Tensor) else v for k, v in row.items()})
        for step, row in rows
    ]


def _keep_steps_until(folder: RunFolder, last_step: int) -> list[dict[str, float]]:
    """Drop lines that the resumed run will write again, and a last line that a kill cut off.

    Returns:
        The rows that are kept.
    """
    if not folder.metrics.exists():
        return []
    lines, rows = [], []
    for line in folder.metrics.read_text().splitlines():
        try:
            row = json.loads(line)
            if row["step"] <= last_step:
                lines.append(line + "\n")
                rows.append(row)
        except (ValueError, KeyError):
            continue
    folder.metrics.write_text("".join(lines))
    return rows


class _Told:
    """Up to which step a listener has had everything for sure: it is noted when it has closed its files.

    What it was told after that may still have been on its way when its processes were killed.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._newest = path, -1

    def note(self, step: int) -> None:
        self._newest = max(self._newest, step)

    def again(
        self, rows: list[dict[str, float]], listener: Callable[[int, Mapping[str, Value]], None]
    ) -> None:
        """Tell ``listener`` those of ``rows`` that may be missing."""
        until = int(self._path.read_text()) if self._path.exists() else -1
        for row in rows:
            if row["step"] > until:
                listener(int(row["step"]), {k: v for k, v in row.items() if k != "step"})

    def close(self) -> None:
        if self._newest >= 0:
            write_atomically(self._path, f"{self._newest}\n")


class _Forgiving:
    """Turns exceptions into warnings, one for each thing that goes wrong."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._said: set[str] = set()

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if what not in self._said:
                self._said.add(what)
                log.warning(
                    "warning: %s could not %s: %s; the run goes on, metrics.jsonl is complete",
                    *(self._name, what, error),
                )


class WandbLog:
    """Weights & Biases on rank 0, one run of theirs for each of ours, however often it is resumed.

    Their own step restarts whenever a run is resumed offline, so ``train/step`` is the axis. Files are
    referred to where they lie, never copied. Without a network an online run is kept offline.

    Args:
        config: mode, project, group and tags.
        folder: the run's; theirs are in ``wandb/`` inside it.
        name: of the run.
        run: its configuration.
        draw: the montage of receptive fields (n, D).
    """

    def __init__(
        self, config: WandbConfig, folder: RunFolder, name: str, run: dict[str, Any], draw: Draw
    ) -> None:
        self._run: Any = None
        self._draw = draw
        self._told = _Told(folder.path / "wandb_told")
        self._forgiving = _Forgiving("W&B")
        self._referred: set[Path] = set()
        if config.mode == "disabled":
            return
        with self._forgiving("start"):
            identity = folder.path / "wandb_id"
            if not identity.exists():
                identity.write_text(secrets.token_hex(4))
            self._start(config, config.mode, folder, name, identity.read_text().strip(), run)
        if self._run is None and config.mode == "online":
            with self._forgiving("start offline either"):
                self._start(config, "offline", folder, name, identity.read_text().strip(), run)

    def _start(
        self,
        config: WandbConfig,
        mode: str,
        folder: RunFolder,
        name: str,
        identity: str,
        run: dict[str, Any],
    ) -> None:
        import wandb

        self._run = wandb.init(
            project=config.project,
            group=config.group,
            tags=config.tags,
            name=name,
            id=identity,
            resume="allow",
            dir=str(folder.path),
            mode=mode,  # type: ignore[arg-type]
            config=run,
            settings=wandb.Settings(silent=True, console="off", x_disable_meta=True),
        )
        self._run.define_metric("*", step_metric="train/step")

    def __call__(self, step: int, values: Mapping[str, Value]) -> None:
        with self._forgiving("log"):
            if self._run is not None:
                named = {_in_panel(key): self._logged(value) for key, value in values.items()}
                self._run.log({"train/step": step, **named})
                self._told.note(step)

    def catch_up(self, rows: list[dict[str, float]]) -> None:
        with self._forgiving("catch up"):
            if self._run is not None:
                self._told.again(rows, self)

    def _logged(self, value: Value | Image.Image) -> Any:
        import wandb

        if isinstance(value, Histogram):
            return wandb.Histogram(np_histogram=(value.counts, value.edges))
        if isinstance(value, Fields):
            value = self._draw(value.weight)
        return wandb.Image(value) if isinstance(value, Image.Image) else value

    def alert(self, text: str) -> None:
        with self._forgiving("send an alert"):
            if self._run is not None:
                self._run.alert("dense2conv", text)

    def images(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        """Log pictures by name."""
        with self._forgiving("log a picture"):
            if self._run is not None and pictures:
                named = {_in_panel(key): self._logged(image) for key, image in pictures.items()}
                self._run.log({"train/step": step, **named})

    def artifact(self, kind: str, path: Path) -> None:
        """Refer to a folder, such as a checkpoint; what lies in it stays there."""
        with self._forgiving(f"refer to the {kind}"):
            if self._run is not None and path.is_dir() and path not in self._referred:
                import wandb

                self._referred.add(path)

                artifact = wandb.Artifact(
                    f"{self._run.id}-{kind}", kind, metadata={"of": path.name}
                )
                # Checkpoints have checksums of their own; to read them all again takes minutes.
                artifact.add_reference(path.resolve().as_uri(), checksum=False)
                self._run.log_artifact(artifact, aliases=["latest", path.name])

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
                import wandb

                self._run.finish()
                wandb.teardown()  # offline the former does not wait until the files are written
                self._told.close()


class TensorboardLog:
    """TensorBoard's event files on rank 0, in ``tensorboard/`` inside the run's folder."""

    def __init__(self, folder: RunFolder, draw: Draw) -> None:
        self._writer: Any = None
        self._draw = draw
        self._told = _Told(folder.path / "tensorboard_told")
        self._forgiving = _Forgiving("TensorBoard")
        with self._forgiving("start"):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder.path / "tensorboard"))

    @staticmethod
    def require() -> None:
        """Raise InputError where TensorBoard is not installed."""
        if importlib.util.find_spec("tensorboard") is None:
            raise InputError(
                "tensorboard=true needs a package that is not installed: "
                "pip install -c constraints.txt 'dense2conv[tensorboard]', or tensorboard=false"
            )

    def __call__(self, step: int, values: Mapping[str, Value]) -> None:
        with self._forgiving("log"):
            if self._writer is not None:
                for key, value in values.items():
                    self._add(_in_panel(key), value, step)
                self._told.note(step)

    def catch_up(self, rows: list[dict[str, float]]) -> None:
        with self._forgiving("catch up"):
            self._told.again(rows, self)

    def _add(self, key: str, value: Value, step: int) -> None:
        if isinstance(value, Fields):
            picture = np.asarray(self._draw(value.weight))
            self._writer.add_image(key, picture, step, dataformats="HWC")
        elif isinstance(value, Histogram):
            counts, edges = value
            centres = (edges[1:] + edges[:-1]) / 2
            self._writer.add_histogram_raw(
                key,
                min=edges[0],
                max=edges[-1],
                num=int(counts.sum()),
                sum=(counts * centres).sum(),
                sum_squares=(counts * centres**2).sum(),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=step,
            )
        else:
            self._writer.add_scalar(key, value, step)

    def alert(self, text: str) -> None:
        with self._forgiving("log a text"):
            if self._writer is not None:
                self._writer.add_text("warning", text)

    def close(self) -> None:
        with self._forgiving("finish"):
            if self._writer is not None:
                self._writer.close()
                self._told.close()


def _in_panel(key: str) -> str:
    return f"{metric(key).panel}/{key}"
