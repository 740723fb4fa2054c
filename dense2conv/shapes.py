"""Shapes shared by every floor: images, grids of places, and how a tensor is spread over processes.

Axis legend, used in the shape comment of every tensor line:

    m   samples of the global batch          D   inputs of a layer
    d   units (features) of a layer          K   kernels
    C   channels, H height, W width of a grid
    tp, dp, pp   sizes of the mesh axes; ``d/tp`` are the units held by one process
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


class InputError(ValueError):
    """A mistake in what the user asked for; the message names the value and the remedy."""


@dataclass(frozen=True)
class ImageShape:
    """Channels, height and width of an image or of a grid of places."""

    channels: int
    height: int
    width: int

    @property
    def numel(self) -> int:
        return self.channels * self.height * self.width

    def __str__(self) -> str:
        return f"{self.channels}×{self.height}×{self.width}"


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where each input of a layer lies: its channel and its place on a grid.

    For pixels this is the image itself; for a deeper layer it is the grid that the layer below
    *discovered*: channel = kernel, (y, x) = place. Several inputs may share a place, and a place
    may be empty. An input that has no place (a left-over or dead unit) has channel -1.

    channel, y, x: (D,) int64.
    """

    shape: ImageShape
    channel: Tensor
    y: Tensor
    x: Tensor

    @classmethod
    def of_image(cls, shape: ImageShape) -> Geometry:
        """Pixels flattened as (C, H, W)."""
        c, y, x = torch.meshgrid(
            torch.arange(shape.channels),
            torch.arange(shape.height),
            torch.arange(shape.width),
            indexing="ij",
        )
        return cls(shape, c.flatten(), y.flatten(), x.flatten())

    def __len__(self) -> int:
        return len(self.channel)

    @cached_property
    def placed(self) -> Tensor:
        """(D,) bool: inputs that have a place on the grid."""
        return self.channel >= 0

    @cached_property
    def coordinates(self) -> Tensor:
        """(D, 2) float64: y and x of every input."""
        return torch.stack([self.y, self.x], dim=1).double()


class Axis:
    """One mesh axis as the mathematics sees it: a sum and a gather. This one is a single process.

    Shards are contiguous and follow ``torch.chunk``: every process holds ``ceil(total / size)``
    rows except the last ones, which may hold fewer, or none.
    """

    size: int = 1
    rank: int = 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of the processes' tensors, the same on each; may overwrite its argument."""
        return tensor

    def begin_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Start what ``sum`` does; the result waits for it, and gives the sum."""
        summed = self.sum(tensor)
        return lambda: summed

    def gather(self, tensor: Tensor, total: int, dim: int = 0) -> Tensor:
        """The processes' shards joined along ``dim``, which then has length ``total``."""
        return tensor

    def scatter_sum(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Own shard along ``dim`` of the sum of the processes' tensors; not differentiable."""
        own = self.shard(tensor.shape[dim])
        return self.sum(tensor).narrow(dim, own.start, len(own))

    def linear(
        self,
        shard: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        num_units: int | None = None,
    ) -> Tensor:
        """X Wᵀ + b of X (m, D), whose columns ``shard`` this process holds.

        weight, bias: (d, D) and (d,), of the units that this process holds.
        num_units: of all processes. Where it is told, weights may travel instead of X if they are
            fewer; what has arrived of them is held until backward.
        """
        return F.linear(self.gather(shard, weight.shape[1], dim=1), weight, bias)

    def shard(self, total: int, rank: int | None = None) -> range:
        """The indices of ``total`` that a process (this one by default) holds."""
        rank = self.rank if rank is None else rank
        chunk = math.ceil(total / self.size)
        return range(min(rank * chunk, total), min((rank + 1) * chunk, total))


class NestedAxis(Axis):
    """An axis whose every shard is split further over another: the own part of the own shard.

    Args:
        outer: splits the whole.
        inner: splits each shard of ``outer``.
    """

    def __init__(self, outer: Axis, inner: Axis) -> None:
        self.outer, self.inner = outer, inner
        self.size = outer.size * inner.size
        self.rank = outer.rank * inner.size + inner.rank

    def sum(self, tensor: Tensor) -> Tensor:
        return self.outer.sum(self.inner.sum(tensor))

    def gather(self, tensor: Tensor, total: int, dim: int = 0) -> Tensor:
        shard = self.inner.gather(tensor, len(self.outer.shard(total)), dim)
        return self.outer.gather(shard, total, dim)

    def shard(self, total: int, rank: int | None = None) -> range:
        outer, inner = divmod(self.rank if rank is None else rank, self.inner.size)
        shard = self.outer.shard(total, outer)
        part = self.inner.shard(len(shard), inner)
        return shard[part.start : part.stop]


WHOLE = Axis()


@dataclass(frozen=True)
class Layout:
    """How an (m, d) tensor of features is spread: samples over one axis, features over the other."""

    samples: Axis = field(default_factory=Axis)
    features: Axis = field(default_factory=Axis)


SINGLE = Layout()
