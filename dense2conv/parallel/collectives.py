"""A mesh axis over a process group: the sum and the gather that the mathematics asks for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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

    @torch.no_grad()
    def scatter_sum(self, tensor: Tensor, dim: int = 0) -> Tensor:
        lengths = self.lengths(tensor.shape[dim])
        if self.sends_pieces(tensor):
            pieces = tensor.split(lengths, dim)
            return _sum_of_pieces(self, lambda rank: pieces[rank].contiguous())()
        # Shards are padded to one length: the backends' own calls know equal pieces only.
        rows = _padded(tensor.movedim(dim, 0), self.size * lengths[0])
        own = rows.new_empty(lengths[0], *rows.shape[1:])
        _reduce_scatter(own, rows, group=self.group)
        return own[: lengths[self.rank]].movedim(0, dim)

    def linear(self, shard: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """As in ``Axis``; in 16 bits a sum over pieces would be rounded after each of them."""
        if self.sends_pieces(shard) and weight.dtype.itemsize > 2:
            return _PiecewiseLinear.apply(shard, weight, bias, self)
        return super().linear(shard, weight, bias)

    def lengths(self, total: int) -> list[int]:
        """How many of ``total`` each process holds."""
        return [len(self.shard(total, rank)) for rank in range(self.size)]

    def sends_pieces(self, tensor: Tensor) -> bool:
        """Whether pieces are best sent one by one: gloo's own gather takes two to five times as long."""
        return self._over_gloo and tensor.device.type == "cpu"

    def others(self, direction: int) -> list[int]:
        """The other ranks, from the neighbour in a direction (1 or -1) on."""
        return [(self.rank + direction * step) % self.size for step in range(1, self.size)]

    def send(self, tensor: Tensor, rank: int) -> Callable[[], object]:
        """Start to send to a process of the group; the result waits until it has left."""
        if tensor.numel() == 0:
            return lambda: None
        work = dist.isend(tensor, group=self.group, group_dst=rank)
        assert work is not None
        # The tensor must outlive the sending.
        return lambda tensor=tensor: work.wait()  # type: ignore[misc]

    def receive(self, tensor: Tensor, rank: int) -> Callable[[], Tensor]:
        """Start to fill ``tensor`` from a process of the group; the result waits, and gives it."""
        if tensor.numel() == 0:
            return lambda: tensor
        work = dist.irecv(tensor, group=self.group, group_src=rank)
        assert work is not None

        def wait() -> Tensor:
            work.wait()
            return tensor

        return wait


class _Gather(torch.autograd.Function):
    """Shards into the whole, and the sum of the whole's gradients back into shards."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: GroupAxis, total: int, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        lengths = axis.lengths(total)
        assert tensor.shape[dim] == lengths[axis.rank], (tensor.shape, dim, total, lengths)
        if axis.sends_pieces(tensor):
            own = tensor.contiguous()
            pieces = {axis.rank: own} | dict(_pieces(axis, own, lengths, dim))
            return torch.cat([pieces[rank] for rank in range(axis.size)], dim)
        # As in ``scatter_sum``.
        rows = _padded(tensor.movedim(dim, 0), lengths[0])
        joined = rows.new_empty(axis.size * lengths[0], *rows.shape[1:])
        _all_gather(joined, rows, group=axis.group)
        # Shards are full up to the first short one, so the padding is all at the end.
        return joined[:total].movedim(0, dim).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.axis.scatter_sum(grads[0], ctx.dim), None, None, None


class _PiecewiseLinear(torch.autograd.Function):
    """x Wᵀ + b of shards: a piece is multiplied while the next ones are on their way.

    The pieces are never joined, and their gradients leave as soon as each is made.
    """

    @staticmethod
    def forward(
        ctx: Any, shard: Tensor, weight: Tensor, bias: Tensor | None, axis: GroupAxis
    ) -> Tensor:
        own = shard.contiguous()
        lengths = axis.lengths(weight.shape[1])
        arriving = _pieces(axis, own, lengths, 1)
        columns = weight.split(lengths, 1)
        output = F.linear(own, columns[axis.rank], bias)  # (m, d/tp)
        pieces = {axis.rank: own}
        for rank, piece in arriving:
            pieces[rank] = piece
            output.addmm_(piece, columns[rank].mT)
        ctx.axis, ctx.has_bias = axis, bias is not None
        ctx.save_for_backward(weight, *(pieces[rank] for rank in range(axis.size)))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (weight, *pieces) = grads, ctx.saved_tensors
        lengths = [piece.shape[1] for piece in pieces]
        of_shard = of_weight = None
        if ctx.needs_input_grad[0]:
            columns = weight.split(lengths, 1)
            of_shard = _sum_of_pieces(ctx.axis, lambda rank: grad @ columns[rank])
        if ctx.needs_input_grad[1]:
            of_weight = torch.empty_like(weight)
            for piece, columns_of_it in zip(pieces, of_weight.split(lengths, 1), strict=True):
                torch.mm(grad.mT, piece, out=columns_of_it)
        of_bias = grad.sum(0) if ctx.has_bias else None
        return None if of_shard is None else of_shard(), of_weight, of_bias, None


def _pieces(
    axis: GroupAxis, own: Tensor, lengths: list[int], dim: int
) -> Iterator[tuple[int, Tensor]]:
    """(rank, its shard) of every other process, as they come; they are on their way at once."""
    arriving = []
    for rank in axis.others(-1):
        shape = list(own.shape)
        shape[dim] = lengths[rank]
        arriving.append((rank, axis.receive(own.new_empty(shape), rank)))
    leaving = [axis.send(own, rank) for rank in axis.others(1)]

    def wait() -> Iterator[tuple[int, Tensor]]:
        for rank, piece in arriving:
            yield rank, piece()
        for has_left in leaving:
            has_left()

    return wait()


def _sum_of_pieces(axis: GroupAxis, piece: Callable[[int], Tensor]) -> Callable[[], Tensor]:
    """Start to sum what every process has for this one; the result waits, and gives the sum.

    Args:
        axis: over whose processes.
        piece: what this process has for the one of a rank, made when it can leave.
    """
    leaving = [axis.send(piece(rank), rank) for rank in axis.others(1)]
    own = piece(axis.rank)
    arriving = {rank: axis.receive(torch.empty_like(own), rank) for rank in axis.others(-1)}

    def finish() -> Tensor:
        terms = (own if rank == axis.rank else arriving[rank]() for rank in range(axis.size))
        summed = functools.reduce(torch.add, terms)
        for has_left in leaving:
            has_left()
        return summed

    return finish


def _padded(rows: Tensor, length: int) -> Tensor:
    """Contiguous rows, with zeros after them up to ``length``; no copy if nothing is missing."""
    if len(rows) == length:
        return rows.contiguous()
    padded = rows.new_zeros(length, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded
