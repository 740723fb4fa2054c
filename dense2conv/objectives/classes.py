"""The classes of a batch, grouped so that all of about one size are worked on together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_PADDING = 1.25  # classes are batched together while this many times their work is done


@dataclass(frozen=True)
class ClassBatch:
    """k classes of about one size, padded to n samples.

    index: (k, n) their samples, ascending; 0 where there is none. mask: (k, n) whether there is
    one, or None if there is everywhere. sizes: (k,) float64.
    """

    index: Tensor
    mask: Tensor | None
    sizes: Tensor

    def rows(self, features: Tensor) -> Tensor:
        """(m, p) → (k, n, p), zeros where there is no sample."""
        k, n = self.index.shape
        rows = features.index_select(0, self.index.flatten()).view(k, n, features.shape[1])
        return rows if self.mask is None else rows.mul_(self.mask[..., None])

    def clear_padding(self, grams: Tensor) -> Tensor:
        """Zero the padding's rows and columns of (k, n, n), in place."""
        if self.mask is None:
            return grams
        return grams.mul_(self.mask[:, :, None]).mul_(self.mask[:, None, :])

    def within(self, samples: range) -> ClassBatch:
        """The same classes among ``samples`` alone, counted from the first of these.

        ``sizes`` stay those of the whole classes.
        """
        here = (self.index >= samples.start) & (self.index < samples.stop)
        if self.mask is not None:
            here &= self.mask
        first = here.byte().argsort(dim=1, descending=True, stable=True)  # those to the front
        first = first[:, : int(here.sum(1).max())]
        mask = here.gather(1, first)
        index = torch.where(mask, self.index.gather(1, first) - samples.start, 0)
        return ClassBatch(index, mask, self.sizes)


@dataclass(frozen=True)
class Classes:
    """All classes of a batch that are not empty; ``complete`` if every sample has one."""

    batches: list[ClassBatch]
    complete: bool

    @classmethod
    def of(cls, labels: Tensor) -> Classes:
        """labels: (m,) integers of all samples, negative where unknown."""
        ordered, order = labels.sort(stable=True)
        _, sizes = ordered.unique_consecutive(return_counts=True)
        num_unknown = int((labels < 0).sum())
        starts = sizes.cumsum(0) - sizes
        known = starts >= num_unknown
        sizes, by_size = sizes[known].sort(stable=True)
        starts = starts[known][by_size]
        batches = []
        for first, last in _runs(sizes.tolist()):
            some = sizes[first:last, None]
            offset = torch.arange(int(some[-1]), device=labels.device)
            mask = offset < some  # (k, n)
            index = order[(starts[first:last, None] + offset).clamp_(max=len(order) - 1)]
            if bool(some[0] == some[-1]):
                batches.append(ClassBatch(index, None, some[:, 0].double()))
            else:
                batches.append(ClassBatch(index.where(mask, 0), mask, some[:, 0].double()))
        return cls(batches, num_unknown == 0)


def _runs(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Cut ascending sizes into runs of which padding to the largest costs little."""
    first = 0
    while first < len(sizes):
        last, work = first + 1, sizes[first] ** 2
        while last < len(sizes):
            padded = (last + 1 - first) * sizes[last] ** 2
            if padded > _MAX_PADDING * (work + sizes[last] ** 2):
                break
            work += sizes[last] ** 2
            last += 1
        yield first, last
        first = last
