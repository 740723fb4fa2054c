"""A mesh axis over a process group: the sum and the gather that the mathematics asks for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dense2conv.objectives.precision import at_least_fp32
from dense2conv.shapes import Axis

# torch 2.13 renames them; 2.11 knows the older names alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# With fewer rows the weights take as long to read as to multiply; with more chunks the calls take
# longer than the traffic that they cover.
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
            own = shard.contiguous()
            arriving = self.begin_pieces(own, lengths, dim)

            def join() -> None:
                pieces = {self.rank: own} | dict(arriving)
                torch.cat([pieces[rank] for rank in range(self.size)], dim, out=whole)

            return join
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

    def begin_pieces(
        self, own: Tensor, lengths: list[int], dim: int
    ) -> Iterator[tuple[int, Tensor]]:
        """(rank, its shard) of every other process, as they come; they are on their way at once."""
        arriving = [
            (rank, self.receive(own.new_empty(_resized(own, dim, lengths[rank])), rank))
            for rank in self.others(-1)
        ]
        leaving = [self.send(own, rank) for rank in self.others(1)]

        def wait() -> Iterator[tuple[int, Tensor]]:
            for rank, piece in arriving:
                yield rank, piece()
            for has_left in leaving:
                has_left()

        return wait()

    @torch.no_grad()
    def scatter_sum(self, tensor: Tensor, dim: int = 0) -> Tensor:
        lengths = self.lengths(tensor.shape[dim])
        shard = tensor.new_empty(_resized(tensor, dim, lengths[self.rank]))
        if self.sends_pieces(tensor):
            self.begin_sum_of_pieces(tensor.split(lengths, dim), shard)()
        else:
            self.begin_scatter_sum(tensor, shard, dim)()
        return shard

    def begin_scatter_sum(self, whole: Tensor, shard: Tensor, dim: int) -> Callable[[], None]:
        """Start to fill ``shard``, which is contiguous, with its part along ``dim`` of the sum of the
        processes' ``whole``; the result waits for it.
        """
        lengths = self.lengths(whole.shape[dim])
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

    def begin_sum_of_pieces(self, pieces: Sequence[Tensor], shard: Tensor) -> Callable[[], None]:
        """Start to fill ``shard`` with the sum of what the processes have for this one, each one's
        ``pieces`` being by rank; the result waits for it.
        """
        leaving = [self.send(pieces[rank].contiguous(), rank) for rank in self.others(1)]
        first = min(self.others(1))  # whose piece is received where the sum is to be
        places = {
            rank: shard if rank == first else torch.empty_like(shard) for rank in self.others(-1)
        }
        arriving = {rank: self.receive(place, rank) for rank, place in places.items()}
        arriving[self.rank] = lambda own=pieces[self.rank]: own  # type: ignore[misc]
        wide = at_least_fp32(shard.dtype)  # 16 bits would be rounded after every piece

        def finish() -> None:
            total = arriving[first]().to(wide)
            # By rank, of the first two in either order: the sum does not depend on whose part it is.
            for rank in range(self.size):
                if rank != first:
                    total.add_(arriving[rank]())
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
    """x Wᵀ + b of shards of x: a part of x, or of its gradient, travels while another is multiplied."""

    @staticmethod
    def forward(
        ctx: Any, shard: Tensor, weight: Tensor, bias: Tensor | None, axis: GroupAxis
    ) -> Tensor:
        # In 16 bits a sum over pieces would be rounded after each of them.
        by_pieces = axis.sends_pieces(shard) and weight.dtype.itemsize > 2
        multiply = _multiply_pieces if by_pieces else _multiply_chunks
        output, columns = multiply(shard, weight, bias, axis)
        ctx.axis, ctx.has_bias = axis, bias is not None
        # Without a gradient of its input a layer needs its weight no more.
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *columns)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (weight, *columns) = grads, ctx.saved_tensors
        of_shard = of_weight = of_bias = None
        leaving: list[Callable[[], None]] = []
        if ctx.needs_input_grad[0]:
            of_shard = grad.new_empty(len(grad), len(ctx.axis.shard(weight.shape[1])))
            lengths = row_chunks(len(grad))
            for rows, place in zip(grad.split(lengths), of_shard.split(lengths), strict=True):
                following = _begin_input_gradient(rows, weight, place, ctx.axis)
                while leaving:
                    leaving.pop()()
                leaving.append(following)
        if ctx.needs_input_grad[1]:
            widths = [part.shape[1] for part in columns]
            of_weight = grad.new_empty(grad.shape[1], sum(widths))
            for part, of_columns in zip(columns, of_weight.split(widths, 1), strict=True):
                torch.mm(grad.mT, part, out=of_columns)
        if ctx.has_bias:
            of_bias = grad.sum(0)
        while leaving:
            leaving.pop()()
        return of_shard, of_weight, of_bias, None


def _multiply_pieces(
    shard: Tensor, weight: Tensor, bias: Tensor | None, axis: GroupAxis
) -> tuple[Tensor, list[Tensor]]:
    """The output (m, d/tp), and x's columns in parts: a piece is multiplied while the next ones come."""
    own = shard.contiguous()
    lengths = axis.lengths(weight.shape[1])
    arriving = axis.begin_pieces(own, lengths, 1)
    columns = weight.split(lengths, 1)
    output = F.linear(own, columns[axis.rank], bias)  # (m, d/tp)
    pieces = {axis.rank: own}
    for rank, piece in arriving:
        pieces[rank] = piece
        output.addmm_(piece, columns[rank].mT)
    return output, [pieces[rank] for rank in range(axis.size)]


def _multiply_chunks(
    shard: Tensor, weight: Tensor, bias: Tensor | None, axis: GroupAxis
) -> tuple[Tensor, list[Tensor]]:
    """The same, x in one part: a chunk of its rows is multiplied while the next one is gathered."""
    whole = shard.new_empty(len(shard), weight.shape[1])  # (m, D)
    output = shard.new_empty(len(shard), len(weight))  # (m, d/tp)
    multiply = torch.mm if bias is None else functools.partial(torch.addmm, bias)
    lengths = row_chunks(len(shard))
    chunks = list(zip(*(t.split(lengths) for t in (shard, whole, output)), strict=True))
    begun = (axis.begin_gather(own, rows, 1) for own, rows, _ in chunks)
    for _, (_, rows, out) in zip(_one_ahead(begun), chunks, strict=True):
        multiply(rows, weight.mT, out=out)
    return output, [whole]


def _begin_input_gradient(
    rows: Tensor, weight: Tensor, place: Tensor, axis: GroupAxis
) -> Callable[[], None]:
    """Start to fill ``place`` with own columns of the sum of the processes' ``rows`` W."""
    if not axis.sends_pieces(rows):
        return axis.begin_scatter_sum(rows @ weight, place, 1)
    columns = weight.split(axis.lengths(weight.shape[1]), 1)
    return axis.begin_sum_of_pieces([rows @ of_rank for of_rank in columns], place)


def row_chunks(num_rows: int) -> list[int]:
    """The rows of each chunk in which a product's input is gathered, and its gradient summed."""
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
