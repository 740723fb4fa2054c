"""A mesh axis over a process group: the sum and the gather that the mathematics asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dense2conv.shapes import Axis

# torch 2.13 renames them; 2.11 knows the older names alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class GroupAxis(Axis):
    """The processes of one group, in the order of their rank in it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._over_gloo = "cpu:gloo" in str(dist.get_backend_config(group))

    def sum(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor: Tensor, total: int, dim: int = 0) -> Tensor:
        """As in ``Axis``; differentiable: every process may use the whole, so the gradient of a
        shard is the sum over processes of the gradients of its copies.
        """
        return _Gather.apply(tensor, self, total, dim)

    def lengths(self, total: int) -> list[int]:
        """How many of ``total`` each process holds."""
        return [len(self.shard(total, rank)) for rank in range(self.size)]

    def sends_pieces(self, tensor: Tensor) -> bool:
        """Whether pieces are best sent one by one: gloo's own gather takes two to five times as long."""
        return self._over_gloo and tensor.device.type == "cpu"

    def exchange(self, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """Send a piece to each process and receive one from each; the own ones are left alone."""
        works = []
        for step in range(1, self.size):
            source, target = (self.rank - step) % self.size, (self.rank + step) % self.size
            if received[source].numel():
                works.append(dist.irecv(received[source], group=self.group, group_src=source))
            if sent[target].numel():
                works.append(dist.isend(sent[target], group=self.group, group_dst=target))
        for work in works:
            assert work is not None
            work.wait()


class _Gather(torch.autograd.Function):
    """Shards into the whole, and the sum of the whole's gradients back into shards."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: GroupAxis, total: int, dim: int) -> Tensor:
        ctx.axis, ctx.total, ctx.dim = axis, total, dim
        lengths = axis.lengths(total)
        assert tensor.shape[dim] == lengths[axis.rank], (tensor.shape, dim, total, lengths)
        if axis.sends_pieces(tensor):
            own = tensor.contiguous()
            pieces = [own.new_empty(_with_length(own, dim, length)) for length in lengths]
            pieces[axis.rank] = own
            axis.exchange([own] * axis.size, pieces)
            return torch.cat(pieces, dim)
        # Shards are padded to one length: the backends' own calls know equal pieces only.
        rows = _padded(tensor.movedim(dim, 0), lengths[0])
        joined = rows.new_empty(axis.size * lengths[0], *rows.shape[1:])
        _all_gather(joined, rows, group=axis.group)
        # Shards are full up to the first short one, so the padding is all at the end.
        return joined[:total].movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        axis, (grad,) = ctx.axis, grads
        lengths = axis.lengths(ctx.total)
        if axis.sends_pieces(grad):
            pieces = [piece.contiguous() for piece in grad.split(lengths, ctx.dim)]
            received = [torch.empty_like(pieces[axis.rank]) for _ in lengths]
            received[axis.rank] = pieces[axis.rank]
            axis.exchange(pieces, received)
            return sum(received[1:], start=received[0]), None, None, None
        rows = _padded(grad.movedim(ctx.dim, 0), axis.size * lengths[0])
        own = rows.new_empty(lengths[0], *rows.shape[1:])
        _reduce_scatter(own, rows, group=axis.group)
        return own[: lengths[axis.rank]].movedim(0, ctx.dim), None, None, None


def _with_length(tensor: Tensor, dim: int, length: int) -> list[int]:
    """The shape of ``tensor`` with another length along ``dim``."""
    shape = list(tensor.shape)
    shape[dim] = length
    return shape


def _padded(rows: Tensor, length: int) -> Tensor:
    """Contiguous rows, with zeros after them up to ``length``; no copy if nothing is missing."""
    if len(rows) == length:
        return rows.contiguous()
    padded = rows.new_zeros(length, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded
