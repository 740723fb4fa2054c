"""The lattice on which a kernel repeats: stride, offset and how much of it is taken.

Shapes:

    n   units of one kernel
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXPLAINED = 0.95  # share of a kernel's units that a lattice must hold


@dataclass(frozen=True)
class Lattice:
    """Places offset + i·stride, i ≥ 0, with the offset that of the first unit on the lattice.

    coverage: distinct places taken, of the lattice places between the first and last taken one.
    """

    stride_y: int
    stride_x: int
    offset_y: int
    offset_x: int
    coverage: float

    def holds(self, y: Tensor, x: Tensor) -> Tensor:
        """(n,) bool: the place is on the lattice."""
        on_y = (y - self.offset_y).remainder(self.stride_y) == 0
        return on_y & ((x - self.offset_x).remainder(self.stride_x) == 0)

    def covered_by(self, y: Tensor, x: Tensor) -> Lattice:
        """The same lattice, from the first of these places (n,), n ≥ 1, with their coverage."""
        offset_y, offset_x = int(y.min()), int(x.min())
        rows = (int(y.max()) - offset_y) // self.stride_y + 1
        columns = (int(x.max()) - offset_x) // self.stride_x + 1
        distinct = len(torch.unique(y * (int(x.max()) + 1) + x))
        return Lattice(
            self.stride_y, self.stride_x, offset_y, offset_x, distinct / (rows * columns)
        )


def fit_lattice(y: Tensor, x: Tensor) -> Lattice:
    """The coarsest lattice that holds at least EXPLAINED of the places, y and x on their own.

    y, x: (n,) int64, n ≥ 1. One row or column of places has stride 1.
    """
    stride_y, phase_y = _largest_stride(y)
    stride_x, phase_x = _largest_stride(x)
    on = (y.remainder(stride_y) == phase_y) & (x.remainder(stride_x) == phase_x)
    return Lattice(stride_y, stride_x, 0, 0, 0.0).covered_by(y[on], x[on])


def _largest_stride(position: Tensor) -> tuple[int, int]:
    """Largest stride, and its phase, that holds EXPLAINED of the positions."""
    values, counts = torch.unique(position, return_counts=True)
    for stride in range(int(values[-1] - values[0]), 1, -1):
        held = torch.zeros(stride, dtype=torch.int64, device=position.device)
        held.index_add_(0, values.remainder(stride), counts)
        most = int(held.argmax())
        # A stride that leaves one place alone on its axis explains nothing.
        alone = int((values.remainder(stride) == most).sum()) < 2
        if not alone and int(held[most]) >= EXPLAINED * len(position):
            return stride, most
    return 1, 0
