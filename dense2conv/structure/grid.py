"""The grid that a layer's inputs lie on, and what padding puts beyond its edges.

Shapes:

    m   samples      D   inputs      C, H, W   grid of the inputs      P   places
"""

from __future__ import annotations

import torch
from torch import Tensor

from dense2conv.shapes import Geometry, InputError

PADDINGS = ("none", "zeros", "reflect", "replicate", "circular")


def fold(position: Tensor, size: int, padding: str) -> Tensor:
    """Index inside ``0 … size-1`` that ``padding`` shows at ``position``; -1 where it shows zero.

    position: int64, any shape. ``none`` and ``zeros`` show zero outside; ``reflect`` mirrors
    without repeating the edge. Raises InputError for an unknown padding.
    """
    if padding in ("none", "zeros"):
        folded = position
    elif padding == "reflect":
        folded = torch.where(position < 0, -position, position)
        folded = torch.where(folded >= size, 2 * (size - 1) - folded, folded)
    elif padding == "replicate":
        folded = position.clamp(0, size - 1)
    elif padding == "circular":
        folded = position.remainder(size)
    else:
        raise InputError(f"padding = {padding!r} is unknown; use one of {', '.join(PADDINGS)}")
    return torch.where((folded < 0) | (folded >= size), torch.full_like(folded, -1), folded)


class InputGrid:
    """Scatters inputs, or the weights on them, to the grid of their geometry.

    Inputs that share a cell are summed, so a kernel gives each of them the same weight; cells
    without an input hold zero, inputs without a place are dropped.

    cell: (D,) int64, (c·H + y)·W + x, and C·H·W for an unplaced input.
    count: (C, H, W) float64, inputs in each cell.
    """

    def __init__(self, geometry: Geometry, device: torch.device | str = "cpu") -> None:
        shape = geometry.shape
        self.channels, self.height, self.width = shape.channels, shape.height, shape.width
        self.num_cells = shape.numel
        check_geometry(geometry)
        cell = (geometry.channel * self.height + geometry.y) * self.width + geometry.x
        cell = torch.where(geometry.placed, cell, torch.full_like(cell, self.num_cells))
        self.cell = cell.to(device)
        self.count = torch.bincount(self.cell, minlength=self.num_cells + 1)[: self.num_cells]
        self.count = self.count.double().view(self.channels, self.height, self.width)
        in_order = torch.arange(self.num_cells, device=device)
        self.is_image = len(cell) == self.num_cells and bool((self.cell == in_order).all())

    def scatter(self, values: Tensor) -> Tensor:
        """(m, D) → (m, C, H, W)."""
        if not self.is_image:
            cells = values.new_zeros(len(values), self.num_cells + 1)
            values = cells.index_add(1, self.cell, values)[:, : self.num_cells]
        return values.reshape(-1, self.channels, self.height, self.width)

    def window(self, y: Tensor, x: Tensor, half: int, padding: str) -> Tensor:
        """(P,) places → (P, s²) int64: y·W + x under every tap of a window, -1 where it is zero."""
        offset = torch.arange(-half, half + 1, device=y.device)
        rows = fold(y[:, None] + offset, self.height, padding)[:, :, None]  # (P, s, 1)
        columns = fold(x[:, None] + offset, self.width, padding)[:, None, :]  # (P, 1, s)
        taps = torch.where((rows < 0) | (columns < 0), -1, rows * self.width + columns)
        return taps.flatten(1)  # (P, s²)

    def gather(self, images: Tensor, taps: Tensor) -> Tensor:
        """Windows of one image: (C, H, W), taps (P, s²) → (P, C, s²)."""
        values = images.flatten(1)[:, taps.clamp_min(0)] * (taps >= 0)  # (C, P, s²)
        return values.transpose(0, 1)

    def gather_own(self, images: Tensor, taps: Tensor) -> Tensor:
        """Window p of image p: (P, C, H, W), taps (P, s²) → (P, C, s²)."""
        index = taps.clamp_min(0)[:, None].expand(-1, self.channels, -1)
        return images.flatten(2).gather(2, index) * (taps >= 0)[:, None]

    def inside(self, y: Tensor, x: Tensor, half: int) -> Tensor:
        """(P,) bool: the window lies inside the image."""
        vertical = (y >= half) & (y < self.height - half)
        return vertical & (x >= half) & (x < self.width - half)


def check_geometry(geometry: Geometry) -> None:
    """Raise InputError where an input lies outside its own grid."""
    shape, placed = geometry.shape, geometry.placed
    for name, index, size in (
        ("channel", geometry.channel, shape.channels),
        ("y", geometry.y, shape.height),
        ("x", geometry.x, shape.width),
    ):
        wrong = placed & ((index < 0) | (index >= size))
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0, 0])
            raise InputError(
                f"input {first} has {name} = {int(index[first])} on a {shape} grid; places count "
                "from 0, and an input without a place has channel -1"
            )
