"""The mesh of processes: pipeline × data × tensor, each axis named."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dense2conv.parallel.collectives import GroupAxis
from dense2conv.parallel.meeting import meet
from dense2conv.parallel.position import Place, Position
from dense2conv.parallel.watch import Watch
from dense2conv.shapes import Axis, InputError, Layout, NestedAxis

SHARDED = ("none", "optimizer", "weights")


@dataclass
class ParallelConfig:
    """How many processes, and what each axis splits."""

    tp: int = field(
        default=1, metadata={"help": "tensor parallel: units of a layer over processes"}
    )
    pp: int = field(default=1, metadata={"help": "pipeline parallel: layers over processes"})
    dp: int = field(
        default=1, metadata={"help": "data parallel: samples of a batch over processes"}
    )
    shard: str = field(
        default="none",
        metadata={
            "help": "over dp: none | optimizer: weights and state at rest | weights: in backward, too"
        },
    )
    dp_shard: int | None = field(
        default=None,
        metadata={
            "help": "with shard: how many neighbours along dp share rows out, as those of a node, the "
            "others holding the same; null: all of them"
        },
    )
    microbatches: int = field(
        default=1, metadata={"help": "pieces a batch is fed forward in; the value stays exact"}
    )
    device: str = field(default="auto", metadata={"help": "auto | cpu | cuda"})
    timeout_s: float = field(
        default=300,
        metadata={
            "help": "seconds after which a process that hangs or is gone has been named, and all have ended"
        },
    )

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def shard_size(self) -> int:
        """How many processes along dp share a layer's rows out among them."""
        if self.shard == "none":
            return 1
        return self.dp if self.dp_shard is None else self.dp_shard

    @property
    def is_sharded(self) -> bool:
        """Whether processes along dp share a layer's rows out among them."""
        return self.shard_size > 1

    @property
    def shard_axis(self) -> str:
        """The name of the axis of those that do: dp, or a part of it."""
        return "dp" if self.shard_size == self.dp else "dp_shard"

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of all of them: with dp's two parts, where neither is all of it."""
        parts = ("dp_shard", "dp_replicate") if 1 < self.shard_size < self.dp else ()
        return ("tp", "dp", *parts, "pp")

    @property
    def dp_replicate(self) -> int:
        """How many processes along dp hold the same rows."""
        return self.dp // self.shard_size

    @property
    def name(self) -> str:
        return f"pp{self.pp}×dp{self.dp}×tp{self.tp}"

    def validate(self, widths: list[int], batch: int) -> None:
        """Raise InputError for a mesh that this network or batch cannot be spread over."""
        for axis in ("tp", "pp", "dp", "microbatches"):
            if getattr(self, axis) < 1:
                raise InputError(f"parallel.{axis}={getattr(self, axis)}; use 1 or more")
        if self.pp > len(widths):
            raise InputError(
                f"parallel.pp={self.pp} is more than the {len(widths)} layers of model.widths={widths}; "
                f"use parallel.pp={len(widths)} or fewer"
            )
        if self.tp > min(widths):
            raise InputError(
                f"parallel.tp={self.tp} is more than the {min(widths)} units of the smallest layer; "
                f"use parallel.tp={min(widths)} or fewer, or wider layers"
            )
        if self.shard not in SHARDED:
            raise InputError(f"parallel.shard={self.shard!r} is unknown; use {', '.join(SHARDED)}")
        if self.dp_shard is not None and self.shard == "none":
            raise InputError(
                f"parallel.dp_shard={self.dp_shard} with parallel.shard=none shares nothing out; use "
                "parallel.shard=optimizer or weights, or leave dp_shard out"
            )
        if self.dp_shard is not None and (self.dp_shard < 1 or self.dp % self.dp_shard):
            raise InputError(
                f"parallel.dp_shard={self.dp_shard} does not divide parallel.dp={self.dp}; use one of "
                f"{[i for i in range(1, self.dp + 1) if self.dp % i == 0]}"
            )
        if batch % (self.dp * self.microbatches):
            raise InputError(
                f"train.batch={batch} does not divide by parallel.dp={self.dp} times "
                f"parallel.microbatches={self.microbatches}; use a multiple of "
                f"{self.dp * self.microbatches}"
            )
        self.validate_device()

    def validate_device(self) -> None:
        """Raise InputError for a device that is unknown or not there."""
        if self.device not in ("auto", "cpu", "cuda"):
            raise InputError(f"parallel.device={self.device!r} is unknown; use auto, cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("parallel.device=cuda, but torch sees no CUDA device; use cpu or auto")
        if not self.timeout_s > 0:
            raise InputError(f"parallel.timeout_s={self.timeout_s:g}; use a positive number")


@dataclass(frozen=True)
class Mesh:
    """This process's place in the mesh, and the axes it communicates over.

    dp_shard, dp_replicate: over the processes along dp that share a layer's rows out, and over those
    that hold the same ones.
    split_mesh: (pp, dp_replicate, dp_shard, tp), where neither of the two is all of dp.
    """

    pp: Axis
    dp: Axis
    tp: Axis
    dp_shard: Axis
    dp_replicate: Axis
    device: torch.device
    device_mesh: DeviceMesh
    split_mesh: DeviceMesh | None = None
    position: Position = field(default_factory=Position)

    @property
    def layout(self) -> Layout:
        """How this process's block of a layer's features lies in the whole batch's."""
        return Layout(samples=self.dp, features=self.tp)

    @property
    def rows(self) -> Axis:
        """What the rows of a stage's weights are spread over: tp, or tp and within it dp_shard."""
        return NestedAxis(self.tp, self.dp_shard) if self.dp_shard.size > 1 else self.tp

    @property
    def rows_mesh(self) -> DeviceMesh:
        """The own stage as torch knows it, the axes that split rows first: (tp, dp), or dp's two parts."""
        whole = self.device_mesh if self.split_mesh is None else self.split_mesh
        ranks = whole.mesh[self.pp.rank]
        names = (whole.mesh_dim_names or ())[:0:-1]  # but for pp
        groups = [whole.get_group(name) for name in names]
        ranks = ranks.permute(*range(ranks.ndim - 1, -1, -1))
        return DeviceMesh.from_group(groups, self.device.type, ranks, mesh_dim_names=names)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the log: rank 0, which holds the first layers."""
        return dist.get_rank() == 0

    @property
    def writes_shards(self) -> bool:
        """Whether this process speaks for its pipeline stage."""
        return self.dp.rank == 0 and self.tp.rank == 0

    def stage(self, num_layers: int, rank: int | None = None) -> range:
        """The layers of a pipeline stage (the own one by default), as even as they come."""
        rank = self.pp.rank if rank is None else rank
        layers = np.array_split(np.arange(num_layers), self.pp.size)[rank]
        return range(int(layers[0]), int(layers[-1]) + 1)

    def peer(self, stage: int) -> int:
        """Global rank of the process with the own dp and tp place in another stage."""
        return int(self.device_mesh.mesh[stage, self.dp.rank, self.tp.rank])

    def join_stages(self, value: Any) -> list[Any] | None:
        """On the first stage, the values of all stages with the own dp and tp place; None elsewhere."""
        if not isinstance(self.pp, GroupAxis):
            return [value]
        values: list[Any] | None = [None] * self.pp.size if self.pp.rank == 0 else None
        dist.gather_object(value, values, group=self.pp.group, group_dst=0)
        return values

    def begin_sum(self, tensor: Tensor) -> dist.Work:
        """Start to sum a tensor in host memory over all processes; it is there after ``.wait()``."""
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None
        return work

    def gather_objects(self, value: Any) -> list[Any]:
        """Every process's ``value``, by rank."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's ``value`` on every process."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def make_mesh(
    pp: int,
    dp: int,
    tp: int,
    device: torch.device,
    position: Position | None = None,
    shard_size: int = 1,
) -> Mesh:
    """The mesh over all processes of the running job; ranks vary fastest along tp.

    Args:
        pp, dp, tp: its sizes.
        device: of its tensors.
        position: of this process, if others are to know how far it is.
        shard_size: how many neighbours along dp share a layer's rows out.
    """
    device_mesh = init_device_mesh(device.type, (pp, dp, tp), mesh_dim_names=("pp", "dp", "tp"))

    def axis(mesh: DeviceMesh, name: str) -> Axis:
        group = mesh.get_group(name)
        return GroupAxis(group) if dist.get_world_size(group) > 1 else Axis()

    axes = axis(device_mesh, "pp"), axis(device_mesh, "dp"), axis(device_mesh, "tp")
    parts, split = (Axis(), axes[1]), None
    if shard_size == dp:
        parts = axes[1], Axis()
    elif shard_size > 1:
        sizes, names = (
            (pp, dp // shard_size, shard_size, tp),
            ("pp", "dp_replicate", "dp_shard", "tp"),
        )
        split = init_device_mesh(device.type, sizes, mesh_dim_names=names)
        parts = axis(split, "dp_shard"), axis(split, "dp_replicate")
    return Mesh(*axes, *parts, device, device_mesh, split, position or Position())


def flat_mesh(mesh: Mesh) -> Mesh:
    """All processes on one tensor-parallel axis: what pruning and extraction run on."""
    return make_mesh(1, 1, dist.get_world_size(), mesh.device, mesh.position)


@contextmanager
def open_mesh(config: ParallelConfig) -> Iterator[Mesh]:
    """Join the job's processes (torchrun's, Slurm's, our own, or this one alone) into the mesh.

    Raises:
        InputError: the number of processes is not pp·dp·tp.
        Fault: they do not find each other, or one of them has hung or gone.
        ToldElsewhere: another process says why the run has ended.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != config.world_size:
        how = f"torchrun --nproc-per-node={config.world_size}, or without torchrun"
        if "SLURM_STEP_ID" in os.environ:
            how = f"srun --ntasks={config.world_size}"
        raise InputError(
            f"parallel.pp={config.pp} × parallel.dp={config.dp} × parallel.tp={config.tp} needs "
            f"{config.world_size} processes, but {world_size} were started; change the mesh, or start "
            f"{config.world_size} ({how})"
        )
    device = _device(config.device)
    with _process_group(device, config.timeout_s) as store:
        position = Position()
        sizes = config.pp, config.dp, config.tp
        mesh = make_mesh(*sizes, device, position, config.shard_size)
        # Nobody may fail, and be gone, while another one still connects to it.
        job = secrets.token_hex(8)
        places = mesh.gather_objects((job, Place.own()))
        store = dist.PrefixStore(f"watch/{places[0][0]}", store)
        hosts = [place for _, place in places]
        with Watch(store, position, hosts, dist.get_rank(), config.timeout_s):
            yield mesh


@contextmanager
def _process_group(device: torch.device, timeout_s: float) -> Iterator[dist.Store]:
    """The default process group, and the store in which its ranks have met."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = meet(timeout_s) if "RANK" in os.environ else dist.HashStore()
    dist.init_process_group(
        backend,
        store=store,
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        yield store
    finally:
        dist.destroy_process_group()


def _device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
