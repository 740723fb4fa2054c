"""A mesh axis over a process group: the sum and the gather that the mathematics asks for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dense2conv.objectives.precision import at_least_fp32
from dense2conv.shapes import Axis

# torch 2.13 renames them; 2.11 knows the older names alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Smaller chunks would read the weights more often than their products are long; more of them would
# leave less of the traffic uncovered than each call costs.
_MIN_CHUNK_ROWS, _MAX_CHUNKS = 256, 8


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

    def begin_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        tensor = tensor.contiguous()
        work = dist.all_reduce(tensor, group=self.group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return tensor

        return finish

    def gather(self, tensor: Tensor, total: int, dim: int = 0) -> Tensor:
        """As in ``Axis``; differentiable: every process may use the whole, so the gradient of a
        shard is the sum over processes of the gradients of its copies.
        """
        return _Gather.apply(tensor, self, total, dim)

    def begin_gather(self, shard: Tensor, whole: Tensor, dim: int) -> Callable[[], None]:
        """Start to fill ``whole``, which is contiguous, with all shards along ``dim``; the result
        waits for it.
        """
        lengths = self.lengths(whole.shape[dim])
        assert shard.shape[dim] == lengths[self.rank], (shard.shape, dim, lengths)
        if self.sends_pieces(shard):
            return self._gather_pieces(shard.contiguous(), whole, dim, lengths)
        padded = _padded(shard, dim, lengths[0])
        fits = dim == 0 and len(whole) == self.size * lengths[0]
        joined = whole if fits else padded.new_empty(self.size, *padded.shape)
        work = _all_gather(joined.view(-1), padded.flatten(), group=self.group, async_op=True)

        def finish() -> None:
            work.wait()
            if not fits:
                shards = zip(joined, lengths, strict=True)
                torch.cat([each.narrow(dim, 0, length) for each, length in shards], dim, out=whole)

        return finish

    def _gather_pieces(
        self, own: Tensor, whole: Tensor, dim: int, lengths: list[int]
    ) -> Callable[[], None]:
        shapes = [_resized(own, dim, length) for length in lengths]
        arriving = {
            rank: self.receive(own.new_empty(shapes[rank]), rank) for rank in self.others(-1)
        }
        leaving = [self.send(own, rank) for rank in self.others(1)]

        def finish() -> None:
            pieces = {self.rank: own} | {rank: piece() for rank, piece in arriving.items()}
            torch.cat([pieces[rank] for rank in range(self.size)], dim, out=whole)
            for has_left in leaving:
                has_left()

        return finish

    @torch.no_grad()
    def scatter_sum(self, tensor: Tensor, dim: int = 0) -> Tensor:
        length = len(self.shard(tensor.shape[dim]))
        shard = tensor.new_empty(_resized(tensor, dim, length))
        self.begin_scatter_sum(tensor, shard, dim)()
        return shard

    def begin_scatter_sum(self, whole: Tensor, shard: Tensor, dim: int) -> Callable[[], None]:
        """Start to fill ``shard``, which is contiguous, with its part along ``dim`` of the sum of the
        processes' ``whole``; the result waits for it.
        """
        lengths = self.lengths(whole.shape[dim])
        if self.sends_pieces(whole):
            pieces = [piece.contiguous() for piece in whole.split(lengths, dim)]
            return self._sum_pieces(pieces, shard)
        shape = (self.size, lengths[0])
        shards = _padded(whole, dim, math.prod(shape)).unflatten(dim, shape).movedim(dim, 0)
        fits = shard.shape[dim] == lengths[0]
        summed = shard if fits else shard.new_empty(shards.shape[1:])
        work = _reduce_scatter(summed.view(-1), shards.flatten(), group=self.group, async_op=True)

        def finish() -> None:
            work.wait()
            if not fits:
                shard.copy_(summed.narrow(dim, 0, lengths[self.rank]))

        return finish

    def _sum_pieces(self, pieces: list[Tensor], shard: Tensor) -> Callable[[], None]:
        leaving = [self.send(pieces[rank], rank) for rank in self.others(1)]
        arriving = [self.receive(torch.empty_like(shard), rank) for rank in self.others(-1)]
        own = pieces[self.rank]

        def finish() -> None:
            # In 16 bits a sum would be rounded after every piece.
            wide = at_least_fp32(shard.dtype)
            total = shard if shard.dtype == wide else shard.new_empty(shard.shape, dtype=wide)
            total.copy_(own)
            for piece in arriving:
                total.add_(piece())
            if total is not shard:
                shard.copy_(total)
            for has_left in leaving:
                has_left()

        return finish

    def linear(self, shard: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _Linear.apply(shard, weight, bias, self)

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
        whole = tensor.new_empty(_resized(tensor, dim, total))
        axis.begin_gather(tensor, whole, dim)()
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.axis.scatter_sum(grads[0], ctx.dim), None, None, None


class _Linear(torch.autograd.Function):
    """x Wᵀ + b of shards of x, in chunks of rows: one travels while another is multiplied."""

    @staticmethod
    def forward(
        ctx: Any, shard: Tensor, weight: Tensor, bias: Tensor | None, axis: GroupAxis
    ) -> Tensor:
        whole = shard.new_empty(len(shard), weight.shape[1])  # (m, D)
        output = shard.new_empty(len(shard), len(weight))  # (m, d/tp)
        multiply = torch.mm if bias is None else functools.partial(torch.addmm, bias)
        lengths = row_chunks(len(shard))
        chunks = list(zip(*(t.split(lengths) for t in (shard, whole, output)), strict=True))
        begun = (axis.begin_gather(own, rows, 1) for own, rows, _ in chunks)
        for _, (_, rows, out) in zip(_one_ahead(begun), chunks, strict=True):
            multiply(rows, weight.mT, out=out)
        ctx.axis, ctx.has_bias = axis, bias is not None
        # Without a gradient of its input a layer needs its weight no more.
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, whole)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (weight, whole) = grads, ctx.saved_tensors
        of_shard = of_weight = of_bias = None
        leaving: list[Callable[[], None]] = []
        if ctx.needs_input_grad[0]:
            of_shard = grad.new_empty(len(grad), len(ctx.axis.shard(whole.shape[1])))
            lengths = row_chunks(len(grad))
            for rows, place in zip(grad.split(lengths), of_shard.split(lengths), strict=True):
                following = ctx.axis.begin_scatter_sum(rows @ weight, place, 1)
                while leaving:
                    leaving.pop()()
                leaving.append(following)
        if ctx.needs_input_grad[1]:
            of_weight = grad.mT @ whole
        if ctx.has_bias:
            of_bias = grad.sum(0)
        while leaving:
            leaving.pop()()
        return of_shard, of_weight, of_bias, None


def row_chunks(num_rows: int) -> list[int]:
    """The rows of each chunk in which the input of a product is gathered."""
    num_chunks = max(1, min(_MAX_CHUNKS, num_rows // _MIN_CHUNK_ROWS))
    length = max(1, math.ceil(num_rows / num_chunks))
    return [min(length, num_rows - start) for start in range(0, num_rows, length)] or [0]


def _one_ahead(begun: Iterable[Callable[[], None]]) -> Iterator[None]:
    """Wait for each of what an iterator begins, once the next has begun too."""
    under_way: list[Callable[[], None]] = []
    for following in begun:
        while under_way:
            under_way.pop()()
            yield
        under_way.append(following)
    while under_way:
        under_way.pop()()
        yield


def _resized(tensor: Tensor, dim: int, length: int) -> list[int]:
    """Its shape, but for the length of ``dim``."""
    shape = list(tensor.shape)
    shape[dim] = length
    return shape


def _padded(tensor: Tensor, dim: int, length: int) -> Tensor:
    """Shards are padded to one length, since the backends' own calls know equal pieces only.

    Shards are full up to the first short one, so the padding of all is at the end.
    """
    missing = length - tensor.shape[dim]
    if missing == 0:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(_resized(tensor, dim, missing))], dim)
