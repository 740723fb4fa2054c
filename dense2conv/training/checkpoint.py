"""Sharded checkpoints that load on any mesh, are never half written, and are never unpickled.

``checkpoints/step_00000500/`` holds safetensors shards (written by DCP, each with its offsets in
the whole tensor) and ``state.json``. It is written under a temporary name and renamed when every
process has finished, so a folder without ``.partial`` is complete.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.optim import Optimizer

from dense2conv.files import write_atomically
from dense2conv.models import DenseStack
from dense2conv.parallel import Mesh
from dense2conv.shapes import InputError

logging.getLogger("torch.distributed.checkpoint").setLevel(logging.WARNING)

_NAME = re.compile(r"step_(\d{8})(_pruned)?")


@dataclass
class CheckpointConfig:
    """When to save, and how much to keep."""

    every: int = field(default=500, metadata={"help": "save every so many steps, and at the end"})
    keep: int = field(default=2, metadata={"help": "keep this many of the newest checkpoints"})

    def validate(self) -> None:
        """Raise InputError for a number under 1."""
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"checkpoint.{name}={getattr(self, name)}; use 1 or more")


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, a pruned one after the unpruned one of its step."""
    found = sorted(p for p in folder.glob("step_*") if _NAME.fullmatch(p.name) and _complete(p))
    return found[-1] if found else None


def _complete(path: Path) -> bool:
    return (path / "state.json").is_file()


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's ``state.json``: step, and the model it belongs to."""
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}/state.json is not readable ({error}); delete that checkpoint to use the one before"
        ) from error
    return state


def save(
    folder: Path,
    mesh: Mesh,
    stack: DenseStack,
    optimizer: Optimizer | None,
    step: int,
    model: dict[str, Any],
    keep: int,
    pruned: bool = False,
) -> None:
    """Write a checkpoint; every process calls this.

    Args:
        folder: the run's checkpoints.
        mesh: the mesh that ``stack`` is spread over.
        stack, optimizer: what is saved; masks and running figures come along.
        step: steps done.
        model: what identifies the network, compared at loading.
        keep: how many complete checkpoints stay.
        pruned: whether these weights have just been pruned.
    """
    name = f"step_{step:08d}" + ("_pruned" if pruned else "")
    partial = folder / (name + ".partial")
    if mesh.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    tensors = {
        key: _as_dtensor(mesh, tensor, total) for key, tensor, total in _state(stack, optimizer)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP warns of its own deprecations
        dcp.save(
            tensors, storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True)
        )
    dist.barrier()
    if mesh.is_main:
        masked = any(stack.layer(i).mask is not None for i in stack.indices)
        state = {"step": step, "model": model, "masked": masked}
        write_atomically(partial / "state.json", json.dumps(state, indent=2))
        shutil.rmtree(folder / name, ignore_errors=True)
        partial.rename(folder / name)
        _forget(folder, keep)
    dist.barrier()


def _forget(folder: Path, keep: int) -> None:
    """Delete what is older than the newest ``keep`` checkpoints, and what kills left half written."""
    complete = sorted(p for p in folder.glob("step_*") if _NAME.fullmatch(p.name) and _complete(p))
    for path in (*complete[: -max(1, keep)], *folder.glob("*.partial")):
        shutil.rmtree(path, ignore_errors=True)


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
        InputError: it belongs to another network, or a file of it is damaged.
    """
    state = read_state(path)
    if state["model"] != model:
        differing = [k for k in model if state["model"].get(k) != model[k]]
        there = {k: state["model"].get(k) for k in differing}
        here = {k: model[k] for k in differing}
        raise InputError(
            f"{path} belongs to another network: it has {there}, this run asks for {here}; "
            "use its values, or another run.name"
        )
    try:
        reader = HuggingFaceStorageReader(str(path))
        stored = reader.read_metadata().state_dict_metadata
    except Exception as error:  # safetensors raises its own types, by version
        raise InputError(
            f"{path} is damaged ({error}); delete it to use the checkpoint before it"
        ) from error
    if state["masked"]:
        for i in stack.indices:
            layer = stack.layer(i)
            layer.mask = torch.ones_like(layer.weight, dtype=torch.bool)
    if optimizer is not None:
        _allocate(optimizer, stack, stored)
    named = list(_state(stack, optimizer))
    missing = [key for key, _, _ in named if key not in stored]
    if missing:
        raise InputError(
            f"{path} lacks {missing[0]} (optimizer or model keys differ); use the optimizer.name it was "
            "written with, or another run.name"
        )
    tensors = {key: _as_dtensor(mesh, tensor, total) for key, tensor, total in named}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)))
    # 0-d tensors travel as one-element copies; shards were filled in place.
    for key, tensor, _ in named:
        if tensor.ndim == 0:
            tensor.copy_(_local(tensors[key])[0])
    return int(state["step"])


def _state(stack: DenseStack, optimizer: Optimizer | None) -> Iterator[tuple[str, Tensor, int]]:
    """Every tensor of the held state with its name and the whole number of its rows (0: not split)."""
    units = {f"layers.{n}": m.num_units for n, m in stack.layers.items()}
    units |= {f"standardise.{n}": m.num_units for n, m in stack.standardise.items()}

    def total(name: str, tensor: Tensor) -> int:
        return units[name.rsplit(".", 1)[0]] if tensor.ndim else 0  # type: ignore[return-value]

    for name, tensor in (*stack.named_parameters(), *stack.named_buffers()):
        yield name, tensor.detach(), total(name, tensor)
    if optimizer is None:
        return
    for name, parameter in stack.named_parameters():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            if isinstance(value, Tensor):
                yield f"optimizer.{name}.{key}", value, total(name, value)


def _allocate(optimizer: Optimizer, stack: DenseStack, stored: dict[str, Any]) -> None:
    """Give the optimizer the states that the checkpoint holds: torch makes them at the first step."""
    for name, parameter in stack.named_parameters():
        for key, metadata in stored.items():
            prefix = f"optimizer.{name}."
            if not key.startswith(prefix):
                continue
            dtype, size = metadata.properties.dtype, metadata.size
            scalar = key.endswith(".step")  # the one state that is a number, not a tensor of rows
            shape = () if scalar else (parameter.shape[0], *size[1:])
            device = "cpu" if scalar else parameter.device
            optimizer.state[parameter][key.removeprefix(prefix)] = torch.zeros(
                shape, dtype=dtype, device=device
            )


def _as_dtensor(mesh: Mesh, tensor: Tensor, total: int) -> Tensor:
    """Own rows as a DTensor, which tells DCP where they lie in the whole; it shares their memory."""
    submesh = mesh.device_mesh["dp", "tp"]
    placements: list[Placement] = [Replicate(), Shard(0) if total else Replicate()]
    if not total:
        tensor = tensor.reshape(1).clone().to(mesh.device)
    shape = torch.Size([total or 1, *tensor.shape[1:]])
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        tensor.contiguous(), submesh, placements, run_check=False, shape=shape, stride=strides
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
