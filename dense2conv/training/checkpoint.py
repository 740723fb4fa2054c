"""Sharded checkpoints, written while training goes on, that load on any mesh and are never unpickled.

``checkpoints/step_00000500/`` holds one safetensors file a process, in the layout of DCP (each
tensor with its offsets in the whole), and ``state.json`` with their checksums. It is written under
a temporary name and renamed when every process has finished, so a folder without ``.partial`` is
complete. Checksums find damage; they do not say who wrote a file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.optim import Optimizer

from dense2conv.files import write_atomically
from dense2conv.models import DenseStack
from dense2conv.models.dense_stack import layer_name
from dense2conv.parallel import Mesh
from dense2conv.shapes import Axis, InputError, NestedAxis

log = logging.getLogger(__name__)
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.WARNING)

_NAME = re.compile(r"step_(\d{8})(_pruned)?")
_METRICS = ("objective", "rate")


@dataclass
class CheckpointConfig:
    """When to save, and how much to keep."""

    every: int = field(default=500, metadata={"help": "save every so many steps, and at the end"})
    keep: int = field(default=2, metadata={"help": "keep this many of the newest checkpoints"})
    best: str = field(
        default="none",
        metadata={"help": "keep the one with the highest of these, too: objective | rate | none"},
    )

    def validate(self) -> None:
        """Raise InputError for a number under 1, or a metric that no checkpoint has."""
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"checkpoint.{name}={getattr(self, name)}; use 1 or more")
        if self.best not in (*_METRICS, "none"):
            raise InputError(
                f"checkpoint.best={self.best!r} is unknown; use {', '.join(_METRICS)} or none"
            )


class Checkpoints:
    """A run's checkpoints, written in the background, at most one at a time.

    Every process makes one, and calls its methods at the same steps. A save that fails, as on a
    full disk, leaves nothing behind: the next one warns and tries again, and only the last one's
    failure ends the run.

    Args:
        config: how many complete checkpoints stay.
        folder: the run's checkpoints.
        mesh: the mesh that the network is spread over.
        model: what identifies the network, compared at loading.
        timeout_s: seconds that a process waits for the others' files.

    ``extra`` is what else a resumed run has to know, fit for JSON: every save takes it along, and
    ``resume`` puts there what it finds.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        folder: Path,
        mesh: Mesh,
        model: dict[str, Any],
        timeout_s: float,
    ) -> None:
        self.config, self.folder, self.mesh, self.model = config, folder, mesh, model
        self.extra: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if mesh.is_main:
            _sweep(folder)
        # A group of its own: what the background says must not meet what the training step says.
        # Nobody has it before rank 0 joins, so nobody writes into what is being swept away.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._thread: threading.Thread | None = None
        self._problem: str | None = None  # that all processes know of
        self._error: Exception | None = None  # that kept this one from hearing of the others

    def save(
        self,
        step: int,
        stack: DenseStack,
        optimizer: Optimizer,
        metrics: Mapping[str, Any] | None = None,
        pruned: bool = False,
        copy: bool = True,
    ) -> None:
        """Copy the held state to host memory and start to write it; waits for the save before.

        Args:
            step: steps done.
            stack, optimizer: what is saved; masks and running figures come along.
            metrics: of this step's batch; the one that ``config.best`` names decides what is best.
            pruned: whether these weights have just been pruned.
            copy: False where nothing changes the state until ``wait`` returns: what is in host
                memory is written from where it lies.

        Raises:
            InputError: a state of the optimizer has no row for each unit.
            RuntimeError: a process was lost during the save before.
        """
        problem = self._join()
        if problem is not None:
            log.warning("warning: %s; the run goes on, and saves again now", problem)
        name = f"step_{step:08d}" + ("_pruned" if pruned else "")
        state: dict[str, Any] = {
            "step": step,
            "model": self.model,
            "optimizer": type(optimizer).__name__,
            "extra": self.extra,
        }
        if self.mesh.is_main and metrics is not None:
            state["metrics"] = {key: float(metrics[key]) for key in _METRICS if key in metrics}
        copies = _own_share(self.mesh, stack, optimizer, copy)
        # A daemon, so that a process which has failed does not wait for the others' files.
        self._thread = threading.Thread(
            target=self._in_background, args=(name, state, *copies), daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when the save in flight is complete.

        Raises:
            InputError: it could not be written.
            RuntimeError: a process was lost meanwhile.
        """
        problem = self._join()
        if problem is not None:
            raise InputError(f"{problem}; put that right, then carry on with resume=true")

    def resume(self, stack: DenseStack, optimizer: Optimizer) -> int | None:
        """Fill ``stack`` and ``optimizer`` from the newest checkpoint that is undamaged.

        Damaged ones are warned of and renamed to ``….damaged``.

        Returns:
            The number of steps done; None where there is no checkpoint yet.

        Raises:
            InputError: it belongs to another network or optimizer, or all are damaged.
        """
        damaged: dict[Path, str] = {}
        for path in reversed(self.mesh.broadcast_object(_complete(self.folder))):
            try:
                state = _verify(path)
            except _Damaged as error:
                damaged[path] = str(error)
                continue
            for other, problem in damaged.items():
                aside = other.with_name(f"{other.name}.damaged")
                log.warning("warning: %s; kept as %s, carrying on from %s", problem, aside, path)
                if self.mesh.is_main:
                    shutil.rmtree(aside, ignore_errors=True)
                    other.rename(aside)
            self.extra = state.get("extra", {})
            return _fill(path, state, self.mesh, stack, optimizer, self.model)
        if damaged:
            raise InputError(
                f"{'; '.join(damaged.values())}: every checkpoint is damaged; delete {self.folder} to "
                "train from the start"
            )
        return None

    def _join(self) -> str | None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise RuntimeError(
                f"{self.folder}: a process was lost while saving, or its file took longer than "
                "parallel.timeout_s; carry on with resume=true"
            ) from self._error
        problem, self._problem = self._problem, None
        return problem

    def _in_background(
        self, name: str, state: dict[str, Any], copies: dict[str, Tensor], places: dict[str, Any]
    ) -> None:
        try:
            self._problem = self._write(name, state, copies, places)
        except Exception as error:  # raised in the training loop, at the next save
            self._error = error

    def _write(
        self, name: str, state: dict[str, Any], copies: dict[str, Tensor], places: dict[str, Any]
    ) -> str | None:
        """All files, then the marker, then the name; what went wrong is returned on every process."""
        partial = self.folder / f"{name}.partial"
        file = partial / f"rank_{dist.get_rank():05d}.safetensors"
        checksum = problem = None
        try:
            checksum = _write_shard(file, copies, places)
        except Exception as error:  # whatever it is: the others wait to hear of it
            needed = sum(tensor.nbytes for tensor in copies.values()) / 2**20
            free = shutil.disk_usage(self.folder).free / 2**20
            problem = (
                f"{file} could not be written ({error}): it needs {needed:.1f} MiB, and "
                f"{free:.1f} MiB are free"
            )
        reports: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, (file.name, checksum, problem), group=self._group)
        outcome = [next((problem for *_, problem in reports if problem), None)]
        if self.mesh.is_main:
            files = {file_name: checksum for file_name, checksum, _ in reports}
            outcome[0] = outcome[0] or self._commit(partial, {**state, "files": files})
            if outcome[0]:
                _sweep(self.folder)
                outcome[0] += f"; the last good checkpoint is {latest(self.folder) or 'none yet'}"
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        return outcome[0]

    def _commit(self, partial: Path, state: dict[str, Any]) -> str | None:
        """Write the marker and give the folder its name, then forget what is too old."""
        final = partial.with_suffix("")
        try:
            marked = {**state, "sha256": _checksum_of_state(state)}
            write_atomically(partial / "state.json", json.dumps(marked, indent=2))
            _sync(partial)
            if final.exists():  # pruned once more: the older one goes with the next sweep
                final.rename(self.folder / f"{final.name}.replaced.partial")
            partial.rename(final)
            _sync(self.folder)
        except OSError as error:
            return f"{partial} could not be finished: {error}"
        complete = _complete(self.folder)
        best = max(complete, key=lambda path: (_metric(path, self.config.best), path.name))
        for path in {*complete[: -self.config.keep]} - {best}:
            path.rename(f"{path}.partial")  # a kill may now leave half of it
        _sweep(self.folder)
        return None


def _own_share(
    mesh: Mesh, stack: DenseStack, optimizer: Optimizer, copy: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What this process writes, in host memory, and where in the whole tensors it lies.

    Rows that several processes along dp hold are shared out among them.
    """
    copies: dict[str, Tensor] = {}
    places: dict[str, Any] = {}
    for name, tensor, total, rows_axis in _state(stack, optimizer):
        offsets: list[int] = []
        if total:
            is_spread = isinstance(rows_axis, NestedAxis)
            rows = NestedAxis(rows_axis, mesh.dp_replicate if is_spread else mesh.dp).shard(total)
            held = rows_axis.shard(total)
            offsets = [rows.start, *[0] * (tensor.ndim - 1)]
            tensor = tensor[rows.start - held.start : rows.stop - held.start]  # (d/tp/dp, …)
        elif not mesh.writes_shards:
            continue
        copies[name] = tensor.to("cpu", copy=copy, memory_format=torch.contiguous_format)
        places[name] = {"saved_offsets": offsets}
    return copies, places


def _write_shard(path: Path, tensors: dict[str, Tensor], places: dict[str, Any]) -> str:
    """Write one process's file through to the disk; returns its checksum."""
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, {"DCP_SHARDING_INFO": json.dumps(places)})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets nobody else read it
    _sync(path)
    return _checksum(path)


def _sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_of_state(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _sweep(folder: Path) -> None:
    """Delete what kills and failures left half written."""
    for path in folder.glob("*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _complete(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first, a pruned one after the unpruned one of its step."""
    return sorted(
        path
        for path in folder.glob("step_*")
        if _NAME.fullmatch(path.name) and (path / "state.json").is_file()
    )


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def _metric(path: Path, name: str) -> float:
    """A checkpoint's figure; below all others where it has none, or none that can be compared."""
    try:
        value = float(_read_state(path)["metrics"][name])
    except (_Damaged, KeyError):
        return -math.inf
    return -math.inf if math.isnan(value) else value


def extra_of(path: Path) -> dict[str, Any]:
    """What was saved with a checkpoint as ``extra``; nothing where it is damaged."""
    try:
        return dict(_read_state(path).get("extra", {}))
    except _Damaged:
        return {}


class _Damaged(Exception):
    """A checkpoint is not what was written."""


def _read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's ``state.json``: step, network, optimizer, metrics, and its files' checksums."""
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        checksum = state.pop("sha256")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _Damaged(f"{path}/state.json is damaged ({error!r})") from error
    if checksum != _checksum_of_state(state):
        raise _Damaged(f"{path}/state.json is damaged: it differs from its checksum")
    return state


def _verify(path: Path) -> dict[str, Any]:
    """A checkpoint's state, after all its files were compared with their checksums.

    Every process calls this and reads its share of the files; all of them raise, or none.
    """
    state: dict[str, Any] = {}
    problem = None
    try:
        state = _read_state(path)
        files = state["files"]
        odd = files.keys() ^ {file.name for file in path.glob("*.safetensors")}
        if odd:
            how = "is missing" if min(odd) in files else "does not belong there"
            raise _Damaged(f"{path} is damaged: {min(odd)} {how}")
        for name in sorted(files)[dist.get_rank() :: dist.get_world_size()]:
            if _checksum(path / name) != files[name]:
                raise _Damaged(f"{path / name} is damaged: it differs from its checksum")
    except (_Damaged, OSError) as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for problem in filter(None, problems):
        raise _Damaged(problem)
    return state


def load(
    path: Path,
    mesh: Mesh,
    stack: DenseStack,
    optimizer: Optimizer | None,
    model: dict[str, Any],
) -> int:
    """Fill ``stack`` and ``optimizer`` from a checkpoint written on any mesh.

    Returns:
        The number of steps done.

    Raises:
        InputError: it belongs to another network or optimizer, or a file of it is damaged.
    """
    try:
        state = _verify(path)
    except _Damaged as error:
        raise InputError(f"{error}; delete {path} to use the checkpoint before it") from error
    return _fill(path, state, mesh, stack, optimizer, model)


def _fill(
    path: Path,
    state: dict[str, Any],
    mesh: Mesh,
    stack: DenseStack,
    optimizer: Optimizer | None,
    model: dict[str, Any],
) -> int:
    if state["model"] != model:
        differing = [k for k in model if state["model"].get(k) != model[k]]
        there = {k: state["model"].get(k) for k in differing}
        here = {k: model[k] for k in differing}
        raise InputError(
            f"{path} belongs to another network: it has {there}, this run asks for {here}; "
            "use its values, or another run.name"
        )
    if optimizer is not None and state["optimizer"] != type(optimizer).__name__:
        raise InputError(
            f"{path} was written with {state['optimizer']}, this run asks for "
            f"{type(optimizer).__name__}; use the optimizer.name it was written with, or another run.name"
        )
    reader = HuggingFaceStorageReader(str(path))
    try:
        stored = reader.read_metadata().state_dict_metadata
    except Exception as error:  # safetensors raises its own types, by version
        raise InputError(
            f"{path} holds a file that is not safetensors ({error}), though its checksum is right: it was "
            "not written by this program; delete it"
        ) from error
    for i in stack.indices:
        layer = stack.layer(i)
        if f"layers.{layer_name(i)}.mask" in stored:
            layer.mask = torch.ones_like(layer.weight, dtype=torch.bool)
    if optimizer is not None:
        _allocate(optimizer, stack, stored)
    tensors = {
        key: _as_dtensor(mesh, tensor, total, rows_axis) if total else tensor
        for key, tensor, total, rows_axis in _state(stack, optimizer)
    }
    weights = {key: tensor for key, tensor in tensors.items() if not key.startswith("optimizer.")}
    states = {key: tensor for key, tensor in tensors.items() if key not in weights}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP warns of its own deprecations
        for part in filter(None, (weights, states)):  # what a load has read stays mapped to its end
            dcp.load(part, storage_reader=reader)
    return int(state["step"])


def _state(
    stack: DenseStack, optimizer: Optimizer | None
) -> Iterator[tuple[str, Tensor, int, Axis]]:
    """Every held tensor with its name, the whole number of its rows (0: a number, not split), and
    what they are spread over.
    """
    units = {f"layers.{n}": m.num_units for n, m in stack.layers.items()}
    units |= {f"standardise.{n}": m.num_units for n, m in stack.standardise.items()}

    def total(name: str, tensor: Tensor) -> int:
        return units[name.rsplit(".", 1)[0]] if tensor.ndim else 0  # type: ignore[return-value]

    for name, tensor in (*stack.named_parameters(), *stack.named_buffers()):
        # What standardises activations is there for all units that are made here.
        spread = stack.layout.features if name.startswith("standardise.") else stack.rows
        yield name, tensor.detach(), total(name, tensor), spread
    if optimizer is None:
        return
    for name, parameter in stack.named_parameters():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            if not isinstance(value, Tensor):
                continue
            if value.ndim and len(value) != len(parameter):
                raise InputError(
                    f"optimizer.name={type(optimizer).__name__}: its {key} has {len(value)} rows for "
                    f"{len(parameter)} units and cannot be split over processes; use another optimizer"
                )
            yield f"optimizer.{name}.{key}", value, total(name, value), stack.rows


def _allocate(optimizer: Optimizer, stack: DenseStack, stored: dict[str, Any]) -> None:
    """Give the optimizer the states that the checkpoint holds: torch makes them at the first step."""
    for name, parameter in stack.named_parameters():
        for key, metadata in stored.items():
            prefix = f"optimizer.{name}."
            if not key.startswith(prefix):
                continue
            number = not metadata.size  # torch keeps those on the CPU
            optimizer.state[parameter][key.removeprefix(prefix)] = torch.zeros(
                () if number else (len(parameter), *metadata.size[1:]),
                dtype=metadata.properties.dtype,
                device="cpu" if number else parameter.device,
            )


def _as_dtensor(mesh: Mesh, tensor: Tensor, total: int, rows_axis: Axis) -> Tensor:
    """Own rows as a DTensor, which tells DCP where they lie in the whole; it shares their memory."""
    over_dp: Placement = Shard(0) if isinstance(rows_axis, NestedAxis) else Replicate()
    rows_mesh = mesh.rows_mesh
    placements = [Shard(0), over_dp, Replicate()][: rows_mesh.ndim]
    shape = torch.Size([total, *tensor.shape[1:]])
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        tensor, rows_mesh, placements, run_check=False, shape=shape, stride=strides
    )
