"""A mesh axis over a process group: the sum and the gather that the mathematics asks for."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dense2conv.shapes import Axis

# torch 2.13 renames it; 2.11 knows the older name alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class GroupAxis(Axis):
    """The processes of one group, in the order of their rank in it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def sum(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor: Tensor, total: int, dim: int = 0) -> Tensor:
        """As in ``Axis``; differentiable: every process may use the whole, so the gradient of a
        shard is the sum over processes of the gradients of its copies.
        """
        return _Gather.apply(tensor, self, total, dim)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: GroupAxis, total: int, dim: int) -> Tensor:
        ctx.axis, ctx.total, ctx.dim = axis, total, dim
        lengths = [len(axis.shard(total, rank)) for rank in range(axis.size)]
        assert tensor.shape[dim] == lengths[axis.rank], (tensor.shape, dim, total, lengths)
        # Shards are padded to one length: all backends gather equal pieces only.
        rows = tensor.movedim(dim, 0)
        padded = rows.new_zeros(lengths[0], *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        pieces = rows.new_empty(axis.size * lengths[0], *rows.shape[1:])
        _all_gather(pieces, padded, group=axis.group)
        # Shards are full up to the first short one, so the padding is all at the end.
        return pieces[:total].movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        own = ctx.axis.shard(ctx.total)
        summed = ctx.axis.sum(grads[0].clone())
        return summed.narrow(ctx.dim, own.start, len(own)), None, None, None
