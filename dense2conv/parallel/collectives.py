"""A mesh axis over a process group: the sum and the gather that the mathematics asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dense2conv.objectives.precision import at_least_fp32
from dense2conv.parallel import products
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
        leaving = [self.send(own, rank) for rank in self.others(1)]
        arriving = [
            (rank, self.receive(own.new_empty(_resized(own, dim, lengths[rank])), rank))
            for rank in self.others(-1)
        ]

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
        self.begin_scatter_sum(tensor, shard, dim)()
        return shard

    def begin_scatter_sum(self, whole: Tensor, shard: Tensor, dim: int) -> Callable[[], None]:
        """Start to fill ``shard``, which is contiguous, with its part along ``dim`` of the sum of the
        processes' ``whole``; the result waits for it.
        """
        lengths = self.lengths(whole.shape[dim])
        if self.sends_pieces(whole):
            pieces = dict(enumerate(whole.split(lengths, dim)))
            arrive = self.begin_sum_of_others(pieces, shard)

            def add_own() -> None:
                total = arrive().add_(pieces[self.rank])
                if total is not shard:
                    shard.copy_(total)

            return add_own
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

    def begin_sum_of_others(
        self, pieces: Mapping[int, Tensor], place: Tensor
    ) -> Callable[[], Tensor]:
        """Start to sum what the others have for this process, as it has ``pieces`` for them, by rank.

        The result waits for the sum, and gives it: in ``place``, or in fp32 where that has 16 bits.
        """
        leaving = [self.send(pieces[rank].contiguous(), rank) for rank in self.others(1)]
        first = min(self.others(1))  # whose piece is received where the sum is to be
        arriving = [
            self.receive(place if rank == first else torch.empty_like(place), rank)
            for rank in sorted(self.others(-1))
        ]
        wide = at_least_fp32(place.dtype)  # 16 bits would be rounded after every piece

        def finish() -> Tensor:
            total = arriving[0]().to(wide)
            for piece in arriving[1:]:
                total.add_(piece())
            for has_left in leaving:
                has_left()
            return total

        return finish

    def begin_exchange(
        self, leaving: Mapping[int, Tensor], places: Mapping[int, Tensor]
    ) -> Callable[[], None]:
        """Start to give every other process its one of ``leaving``, by rank, and to fill ``places``
        with what they have for this one; the result waits for it.
        """
        others = sorted(self.others(1))
        sent = torch.cat([leaving[rank].flatten() for rank in others])
        sizes = [0] * self.size, [0] * self.size
        for rank in others:
            sizes[0][rank], sizes[1][rank] = places[rank].numel(), leaving[rank].numel()
        arrived = sent.new_empty(sum(sizes[0]))
        work = dist.all_to_all_single(arrived, sent, *sizes, group=self.group, async_op=True)

        def finish(sent: Tensor = sent) -> None:  # it must outlive its sending
            work.wait()
            pieces = arrived.split(sizes[0])
            for rank in others:
                places[rank].copy_(pieces[rank].view_as(places[rank]))

        return finish

    def linear(
        self,
        shard: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        num_units: int | None = None,
    ) -> Tensor:
        return products.linear(shard, weight, bias, num_units, self)

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
