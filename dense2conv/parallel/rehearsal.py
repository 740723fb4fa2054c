"""A process of a mesh whose other processes are not there, with tensors that have no numbers.

The code that runs is the real one, on torch's fake process group. Collectives and the bytes that
tensors take are counted where torch dispatches its operations, so nothing has to be replaced.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dense2conv.objectives import factorisation
from dense2conv.parallel.collectives import GroupAxis
from dense2conv.parallel.mesh import Mesh, ParallelConfig, make_mesh
from dense2conv.shapes import InputError

Calls = Counter[tuple[str, str, int]]  # of a kind, over a mesh axis, of so many bytes

_KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "send": "send",
    "recv_": "receive",
}


class Recorder(TorchDispatchMode):
    """Counts the collectives that are called, and the bytes of the tensors that are alive.

    Bytes of a call are those of the joined tensor of an all_gather or reduce_scatter, of the larger
    tensor of an all_to_all, and of the tensor of the others.
    """

    def __init__(self, axes: dict[str, str]) -> None:
        super().__init__()
        self._axes = axes  # by the name of their group; the pipeline's are of no group of their own
        self._held: dict[int, int] = {}
        self.calls: Calls = Counter()
        self.alive = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            sizes = [t.numel() * t.element_size() for t in tree_leaves(args) if _is_tensor(t)]
            groups = [a for a in args if isinstance(a, torch.ScriptObject)]
            name = dist.ProcessGroup.unbox(groups[0]).group_name
            kind = func.overloadpacket._qualified_op_name.split("::")[1]
            self.calls[_KINDS.get(kind, kind), self._axes.get(name, "pp"), max(sizes)] += 1
        for tensor in filter(_is_tensor, tree_leaves(result)):
            self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._held:
            return
        self._held[key] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._let_go, key)

    def _let_go(self, key: int) -> None:
        self.alive -= self._held.pop(key)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@contextmanager
def fake_group(config: ParallelConfig, rank: int) -> Iterator[tuple[Mesh, Recorder]]:
    """Rank ``rank`` of the mesh, and what it does; tensors made in ``without_numbers`` are fake.

    Raises:
        InputError: this process has real processes beside it.
    """
    from torch.distributed._tools import fake_collectives  # noqa: F401, gives them fake tensors
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise InputError("a rehearsal takes one process; start it without torchrun or srun")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=config.world_size)
    try:
        sizes = config.pp, config.dp, config.tp
        mesh = make_mesh(*sizes, torch.device("cpu"), shard_size=config.shard_size)
        axes = {
            str(axis.group.group_name): name
            for name in ("dp_shard", "dp_replicate", "tp", "dp", "pp")
            if isinstance(axis := getattr(mesh, name), GroupAxis)
        }
        yield mesh, Recorder(axes)
    finally:
        dist.destroy_process_group()


@contextmanager
def without_numbers(recorder: Recorder, mode: FakeTensorMode) -> Iterator[None]:
    """A block whose tensors have shapes alone; what the host asks a device value is answered by no.

    Which also says that an fp32 Gram matrix is too coarse, as it is for many units.
    """
    with mode, recorder, mock.patch.object(factorisation, "is_true", return_value=False):
        yield
