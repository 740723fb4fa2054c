"""The k largest weights of a tensor that no process holds whole, exactly.

Radix select: the bit pattern of a non-negative float, read as an integer, has the float's order.
Four rounds of a 16-bit (fp64) or 8-bit (fp32) histogram and one small all-reduce each fix the k-th
magnitude bit by bit; a last sum shares its ties by lowest global index. The number of rounds is
fixed and no branch depends on a device value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dense2conv.shapes import Axis, InputError

_ROUNDS = 4
_PIECE = 1 << 18  # weights that are looked at at once


@dataclass
class PruneConfig:
    """Which weights are kept."""

    sparsity: float = field(
        default=0.95,
        metadata={
            "help": "share of weights to remove by magnitude; 0: remove just the exact zeros"
        },
    )
    scope: str = field(
        default="layer",
        metadata={"help": "layer: that share of each layer | global: of all together"},
    )

    def validate(self) -> None:
        """Raise InputError for a share or a scope that cannot be."""
        if not 0 <= self.sparsity < 1:
            raise InputError(f"prune.sparsity={self.sparsity}; use a share in [0, 1), e.g. 0.95")
        if self.scope not in ("layer", "global"):
            raise InputError(f"prune.scope={self.scope!r} is unknown; use layer or global")


@torch.no_grad()
def magnitude_mask(shards: Sequence[Tensor], num_kept: int, axis: Axis) -> list[Tensor]:
    """Masks that keep the ``num_kept`` weights of largest magnitude over all tensors and processes.

    The same masks as a stable descending sort of |w| over the gathered tensors gives: ties go to
    the earlier tensor, then to the lower global index; zeros are never kept, so fewer may remain.

    Args:
        shards: own rows of each weight, all of one floating dtype of 32 or 64 bits (16-bit ones are
            compared as fp32); process r holds the rows that follow those of process r − 1.
        num_kept: how many weights may stay.
        axis: the processes that hold the rows.

    Returns:
        One bool tensor of each shard's shape.
    """
    if not shards:
        return []
    bits = 64 if shards[0].dtype == torch.float64 else 32
    width = bits // _ROUNDS
    device = shards[0].device
    prefix = torch.zeros((), dtype=torch.int64, device=device)  # top bits of the k-th key, so far
    # The rank of the k-th key within that prefix; keeping none is settled at the end.
    wanted = torch.tensor(max(num_kept, 1), dtype=torch.int64, device=device)

    for shift in range(bits - width, -1, -width):
        histogram = torch.zeros(2**width, dtype=torch.int64, device=device)
        for shard in shards:
            for _, key in _keys(shard):
                digit = (key >> shift) & (2**width - 1)
                # Keys outside the prefix add 0 rather than being selected: no size depends on data.
                inside = ((key >> shift) >> width == prefix).long()
                histogram.index_add_(0, digit, inside)
        histogram = axis.sum(histogram)
        above = histogram.flip(0).cumsum(0).flip(0) - histogram  # keys with a larger digit
        # The digit of the k-th key: the largest one with at least `wanted` keys at or above it.
        enough = above + histogram >= wanted
        digit = (enough * torch.arange(2**width, device=device)).amax()
        wanted = wanted - above.take(digit)  # above[digit] would wait for the digit
        prefix = (prefix << width) | digit

    masks = []
    before = torch.zeros((), dtype=torch.int64, device=device)  # ties in earlier tensors
    for shard in shards:
        counts = torch.zeros(axis.size, dtype=torch.int64, device=device)
        for _, key in _keys(shard):
            counts[axis.rank] += (key == prefix).sum()
        counts = axis.sum(counts)
        num_ties = before + counts[: axis.rank].sum()
        mask = torch.empty(shard.shape, dtype=torch.bool, device=device)
        for where, key in _keys(shard):
            tie = key == prefix
            rank_of_tie = num_ties + tie.cumsum(0)  # from 1
            kept = (key > prefix) | (tie & (rank_of_tie <= wanted))
            mask.view(-1)[where] = kept & (key != 0) & (num_kept > 0)
            num_ties = rank_of_tie[-1]
        masks.append(mask)
        before = before + counts.sum()
    return masks


def _keys(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """|w| as int64 of the same order, (n,), a piece after the other, so that temporaries are small."""
    flat = weight.detach().reshape(-1)
    for start in range(0, len(flat), _PIECE):
        where = slice(start, start + _PIECE)
        magnitude = flat[where].abs()
        if magnitude.dtype == torch.float64:
            yield where, magnitude.view(torch.int64)
        else:
            yield where, magnitude.float().view(torch.int32).long()
