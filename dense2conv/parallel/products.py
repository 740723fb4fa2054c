"""Products of features that are spread over a mesh axis with weights whose units are.

m   samples     D   inputs of a layer, D/tp of them here     d   units, d/tp of them here

Either the inputs travel, or blocks of the weights and what they make of own inputs. A part of what
travels does so while another one is multiplied.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from dense2conv.parallel.collectives import GroupAxis

# With fewer rows the weights take as long to read as to multiply; with more chunks the calls take
# longer than the traffic that they cover. Gloo's calls, in which pieces are sent, take longest.
_MIN_CHUNK_ROWS, _MAX_CHUNKS, _MAX_CHUNKS_IN_PIECES = 256, 8, 2


def linear(
    shard: Tensor, weight: Tensor, bias: Tensor | None, num_units: int | None, axis: GroupAxis
) -> Tensor:
    """As in ``Axis``."""
    exchanges = (
        num_units is not None
        and shard.requires_grad
        and weights_travel(len(shard), weight.shape[1], num_units, axis.size)
    )
    if not exchanges:
        return _GatheredLinear.apply(shard, weight, bias, axis)
    output: Tensor = _ExchangedLinear.apply(shard, weight, num_units, axis)
    return output if bias is None else output + bias


def weights_travel(num_rows: int, num_inputs: int, num_units: int, size: int) -> bool:
    """Whether that is fewer numbers than if inputs did, forward and backward together."""
    return num_units * (num_rows + num_inputs / size) < num_rows * num_inputs


class _GatheredLinear(torch.autograd.Function):
    """x Wᵀ + b of shards of x."""

    @staticmethod
    def forward(
        ctx: Any, shard: Tensor, weight: Tensor, bias: Tensor | None, axis: GroupAxis
    ) -> Tensor:
        output, columns = _gather_and_multiply(shard, weight, bias, axis)
        ctx.axis, ctx.has_bias = axis, bias is not None
        # Without a gradient of its input a layer needs its weight no more.
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *columns)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (weight, *columns) = grads, ctx.saved_tensors
        of_shard = of_weight = of_bias = None
        summing: list[Callable[[], None]] = []
        if ctx.needs_input_grad[0]:
            of_shard, summing = _multiply_and_sum(grad, weight, ctx.axis)
        if ctx.needs_input_grad[1]:
            widths = [part.shape[1] for part in columns]
            of_weight = grad.new_empty(grad.shape[1], sum(widths))
            for part, of_columns in zip(columns, of_weight.split(widths, 1), strict=True):
                torch.mm(grad.mT, part, out=of_columns)
        if ctx.has_bias:
            of_bias = grad.sum(0)
        for finish in summing:
            finish()
        return of_shard, of_weight, of_bias, None


class _ExchangedLinear(torch.autograd.Function):
    """x Wᵀ of shards of x, which stay: for layers of fewer units than inputs.

    Every process is sent the block of all units' weights for its own inputs; what the processes make
    of it is summed into units. Backward is the mirror image.
    """

    @staticmethod
    def forward(ctx: Any, shard: Tensor, weight: Tensor, num_units: int, axis: GroupAxis) -> Tensor:
        columns = weight.new_empty(num_units, shard.shape[1])  # (d, D/tp)
        blocks = columns.split(axis.lengths(num_units))
        leaving = weight.split(axis.lengths(weight.shape[1]), 1)
        arrive = axis.begin_exchange(dict(enumerate(leaving)), dict(enumerate(blocks)))
        blocks[axis.rank].copy_(leaving[axis.rank])
        arrive()
        output, summing = _multiply_and_sum(shard, columns.mT, axis)  # (m, d/tp)
        for finish in summing:
            finish()
        ctx.axis, ctx.num_inputs = axis, weight.shape[1]
        ctx.save_for_backward(shard, columns)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (shard, columns), axis = grads, ctx.saved_tensors, ctx.axis
        of_shard, units = _gather_and_multiply(grad.contiguous(), columns.mT, None, axis)
        if len(units) == 1:
            units = list(units[0].split(axis.lengths(len(columns)), 1))
        of_weight = grad.new_empty(grad.shape[1], ctx.num_inputs)
        parts = of_weight.split(axis.lengths(ctx.num_inputs), 1)
        # Those of the others first: they are on their way while own ones are made.
        leaving = {rank: units[rank].mT @ shard for rank in axis.others(1)}
        arrive = axis.begin_exchange(leaving, dict(enumerate(parts)))
        torch.mm(units[axis.rank].mT, shard, out=parts[axis.rank])
        arrive()
        return of_shard, of_weight, None, None


def _gather_and_multiply(
    shard: Tensor, weight: Tensor, bias: Tensor | None, axis: GroupAxis
) -> tuple[Tensor, list[Tensor]]:
    """The output, and x's columns in one part or in one of every process; ``shard`` is own columns."""
    # In 16 bits a sum over pieces would be rounded after each of them.
    by_pieces = axis.sends_pieces(shard) and weight.dtype.itemsize > 2
    return (_multiply_pieces if by_pieces else _multiply_chunks)(shard, weight, bias, axis)


def _multiply_pieces(
    shard: Tensor, weight: Tensor, bias: Tensor | None, axis: GroupAxis
) -> tuple[Tensor, list[Tensor]]:
    """A piece is multiplied while the next ones come."""
    own = shard.contiguous()
    lengths = axis.lengths(weight.shape[1])
    arriving = axis.begin_pieces(own, lengths, 1)
    columns = weight.split(lengths, 1)
    output = F.linear(own, columns[axis.rank], bias)
    pieces = {axis.rank: own}
    for rank, piece in arriving:
        pieces[rank] = piece
        output.addmm_(piece, columns[rank].mT)
    return output, [pieces[rank] for rank in range(axis.size)]


def _multiply_chunks(
    shard: Tensor, weight: Tensor, bias: Tensor | None, axis: GroupAxis
) -> tuple[Tensor, list[Tensor]]:
    """A chunk of rows is multiplied while the next one is gathered."""
    whole = shard.new_empty(len(shard), weight.shape[1])
    output = shard.new_empty(len(shard), len(weight))
    multiply = torch.mm if bias is None else functools.partial(torch.addmm, bias)
    lengths = row_chunks(len(shard))
    chunks = list(zip(*(t.split(lengths) for t in (shard, whole, output)), strict=True))
    begun = (axis.begin_gather(own, rows, 1) for own, rows, _ in chunks)
    for _, (_, rows, out) in zip(_one_ahead(begun), chunks, strict=True):
        multiply(rows, weight.mT, out=out)
    return output, [whole]


def _multiply_and_sum(
    rows: Tensor, weight: Tensor, axis: GroupAxis
) -> tuple[Tensor, list[Callable[[], None]]]:
    """Own columns of the sum of the processes' ``rows`` W, and what is still to be waited for.

    A chunk of rows travels while the next one is multiplied, the last one after the return.
    """
    by_pieces = axis.sends_pieces(rows)
    begin = _begin_sum_of_pieces if by_pieces else _begin_sum_of_chunk
    lengths = row_chunks(len(rows), _MAX_CHUNKS_IN_PIECES if by_pieces else _MAX_CHUNKS)
    summed = rows.new_empty(len(rows), len(axis.shard(weight.shape[1])))
    summing: list[Callable[[], None]] = []
    for chunk, place in zip(rows.split(lengths), summed.split(lengths), strict=True):
        following = begin(chunk, weight, place, axis)
        while summing:
            summing.pop()()
        summing.append(following)
    return summed, summing


def _begin_sum_of_chunk(
    rows: Tensor, weight: Tensor, place: Tensor, axis: GroupAxis
) -> Callable[[], None]:
    return axis.begin_scatter_sum(rows @ weight, place, 1)


def _begin_sum_of_pieces(
    rows: Tensor, weight: Tensor, place: Tensor, axis: GroupAxis
) -> Callable[[], None]:
    """What the others are sent is multiplied first, and what stays here onto the sum of theirs."""
    columns = weight.split(axis.lengths(weight.shape[1]), 1)
    pieces = {rank: rows @ columns[rank] for rank in axis.others(1)}
    arrive = axis.begin_sum_of_others(pieces, place)

    def finish() -> None:
        total = arrive()
        if total is place:
            place.addmm_(rows, columns[axis.rank])
        else:
            place.copy_(total.add_(rows @ columns[axis.rank]))

    return finish


def row_chunks(num_rows: int, most: int = _MAX_CHUNKS) -> list[int]:
    """The rows of each chunk in which what travels does."""
    num_chunks = max(1, min(most, num_rows // _MIN_CHUNK_ROWS))
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
