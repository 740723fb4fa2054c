"""Groups of features, given or neighbours on a topography, and what they cost together.

A group's norm is one number for features that are active together. Blocks find subspaces;
overlapping neighbourhoods lay the features out on a map, and the norms are what a pool of
neighbours sees.

    n   memberships, pairs of a feature and a group     G   groups
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from dense2conv.objectives.checks import require_at_least, require_finite
from dense2conv.objectives.precision import at_least_fp32
from dense2conv.objectives.sums import global_shape, total
from dense2conv.shapes import SINGLE, InputError, Layout


@dataclass(frozen=True, eq=False)
class Groups:
    """Which feature is in which group; a feature may be in several groups, or in none.

    feature, group: (n,) int64, the pairs.
    num_features, num_groups: d and G.

    Raises:
        InputError: a pair is out of range, or given twice.
    """

    feature: Tensor
    group: Tensor
    num_features: int
    num_groups: int

    def __post_init__(self) -> None:
        if self.feature.shape != self.group.shape or self.feature.ndim != 1:
            raise InputError(
                f"features {tuple(self.feature.shape)} and groups {tuple(self.group.shape)} are "
                "not pairs; use two vectors of one length"
            )
        for key, index, count in (
            ("feature", self.feature, self.num_features),
            ("group", self.group, self.num_groups),
        ):
            outside = index[(index < 0) | (index >= count)]
            if len(outside):
                raise InputError(f"{key} {int(outside[0])} does not exist; use 0 to {count - 1}")
        if len(torch.unique(self.feature * self.num_groups + self.group)) < len(self.feature):
            raise InputError("a feature is in the same group twice; give every pair once")

    @cached_property
    def overlap(self) -> int:
        """The most groups that any feature is in; 1 where groups are disjoint."""
        return int(self.feature.bincount(minlength=1).max())

    def held(self, features: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """The pairs of the columns of ``features`` (m/dp, d/tp), which count from the first one."""
        own = layout.features.shard(self.num_features)
        if features.ndim != 2 or features.shape[1] != len(own):
            raise InputError(
                f"features {tuple(features.shape)} do not fit groups of {self.num_features} "
                f"features, {len(own)} of them held here; use (m, {len(own)})"
            )
        inside = (self.feature >= own.start) & (self.feature < own.stop)
        return (
            (self.feature[inside] - own.start).to(features.device),
            self.group[inside].to(features.device),
        )


def blocks(num_features: int, size: int) -> Groups:
    """Disjoint groups of ``size`` features in a row; the last one may be shorter."""
    require_at_least(1, num_features=num_features, size=size)
    feature = torch.arange(num_features)
    return Groups(feature, feature // size, num_features, -(-num_features // size))


def ring(num_features: int, radius: int) -> Groups:
    """A group round every feature of a closed line: itself and ``radius`` on each side."""
    return _neighbourhoods(1, num_features, (0, radius), wraps=True)


def torus(height: int, width: int, radius: int) -> Groups:
    """A group round every feature of a closed sheet, a square of (2 radius + 1)².

    Feature y·width + x lies at (y, x), and borders meet the opposite ones. The topography of
    Hyvärinen & Hoyer 2001.
    """
    return _neighbourhoods(height, width, (radius, radius), wraps=True)


def grid(height: int, width: int, radius: int) -> Groups:
    """As ``torus``, but of a sheet with borders, where squares are cut off."""
    return _neighbourhoods(height, width, (radius, radius), wraps=False)


def group_norms(
    features: Tensor, groups: Groups, smoothing: float = 0.0, layout: Layout = SINGLE
) -> Tensor:
    """√(Σ_{j∈g} z_j² + ε) of every sample and group, by one sum of the squares over tp.

    Args:
        features: (m/dp, d/tp), the block held here.
        groups: of all d features; they may overlap, and cross processes.
        smoothing: ε ≥ 0, in the units of z². At ε = 0 a group of zeros has the gradient 0.
        layout: how the features are spread.

    Returns:
        (m/dp, G), the same on the processes of tp, in the features' precision, at least fp32, for a
        computation that they do alike. Where each goes on with its own shard, as in a next layer,
        pass it through ``sums.shared``.

    Raises:
        InputError: the groups are of another number of features; ε < 0.
    """
    require_at_least(0, smoothing=smoothing)
    feature, group = groups.held(features, layout)
    z = features.to(at_least_fp32(features.dtype))
    # Transposed, so that whole rows are added: ten times as fast as columns.
    squares = z.square().mT.contiguous()[feature]  # (n/tp, m/dp)
    sums = z.new_zeros(groups.num_groups, len(z)).index_add(0, group, squares).mT
    sums = total(sums, layout.features) + smoothing  # (m/dp, G)
    zero = sums == 0
    return sums.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def group_sparsity(
    features: Tensor,
    groups: Groups,
    smoothing: float = 0.01,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """E Σ_g √(Σ_{j∈g} z_j² + ε), an activity cost to be minimised; E is the mean over samples.

    Features of one group are free to be active together, groups are not. Something else must keep
    the features from vanishing: a rate, a reconstruction, or an orthonormal basis.

    Args:
        features: (m/dp, d/tp), the block held here.
        groups, smoothing: see ``group_norms``; silence costs √ε a group.
        layout: how the features are spread.
        num_samples: m, where the caller knows it; otherwise it is summed.
        name: whose features these are, for error messages.

    Returns:
        A scalar, the same on every process, in the features' precision, at least fp32. Its
        gradient is that of the one whole-batch value, own block.

    Raises:
        InputError: the groups are of another number of features; ε < 0.
        ValueError: the features hold NaN or Inf.

    Source: Hyvärinen & Hoyer 2001, A two-layer sparse coding model learns simple and complex cell
    receptive fields and topography from natural images.
    """
    m, _ = global_shape(features, layout, num_samples, groups.num_features)
    norms = group_norms(features, groups, smoothing, layout)
    mean = total(norms.sum(dtype=torch.float64), layout.samples) / m
    return require_finite(mean, name).to(norms.dtype)


class GroupSparsity(nn.Module):
    """``group_sparsity`` as a module, to be minimised."""

    def __init__(
        self,
        groups: Groups,
        smoothing: float = 0.01,
        layout: Layout = SINGLE,
        name: str = "the layer",
    ) -> None:
        super().__init__()
        require_at_least(0, smoothing=smoothing)
        self.groups, self.smoothing, self.layout, self.name = groups, smoothing, layout, name

    def forward(self, features: Tensor) -> Tensor:
        """features: (m/dp, d/tp)."""
        return group_sparsity(features, self.groups, self.smoothing, self.layout, name=self.name)


@torch.no_grad()
def shrink_groups(
    features: Tensor, threshold: float, groups: Groups, layout: Layout = SINGLE
) -> Tensor:
    """The proximal map of t Σ_g ‖z_g‖₂: every group moves t towards zero, as one, and stops there.

    Args:
        features: (m/dp, d/tp), the block held here; a feature in no group stays as it is.
        threshold: t ≥ 0.
        groups: disjoint; they may cross processes, for one sum of the squares over tp.
        layout: how the features are spread.

    Returns:
        (m/dp, d/tp), in the features' precision; not differentiable.

    Raises:
        InputError: groups overlap; t < 0.
    """
    require_at_least(0, threshold=threshold)
    if groups.overlap > 1:
        raise InputError(
            f"a feature is in {groups.overlap} groups: overlapping groups have no proximal map in "
            "closed form; use disjoint ones, or a smoothed norm"
        )
    norms = group_norms(features, groups, 0.0, layout)  # (m/dp, G)
    kept = (1 - threshold / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(min=0)
    feature, group = groups.held(features, layout)
    shrunk = (features[:, feature] * kept[:, group]).to(features.dtype)
    return features.index_copy(1, feature, shrunk)


def _neighbourhoods(height: int, width: int, radius: tuple[int, int], wraps: bool) -> Groups:
    """A group round every place (y, x): all places within ``radius`` of it, down and across."""
    require_at_least(1, height=height, width=width)
    require_at_least(0, radius=radius[1])
    sides = (height, width)
    if wraps and any(2 * r + 1 > side for r, side in zip(radius, sides, strict=True)):
        raise InputError(
            f"radius={radius[1]} goes round {height}×{width} features and meets itself; "
            f"use {(min(s for s, r in zip(sides, radius, strict=True) if r) - 1) // 2} or less"
        )
    places = [torch.arange(side) for side in sides]
    steps = [torch.arange(-r, r + 1) for r in radius]
    y, x, down, across = (t.flatten() for t in torch.meshgrid(*places, *steps, indexing="ij"))
    group, to_y, to_x = y * width + x, y + down, x + across
    inside = (to_y >= 0) & (to_y < height) & (to_x >= 0) & (to_x < width)
    feature = to_y % height * width + to_x % width
    if not wraps:
        feature, group = feature[inside], group[inside]
    return Groups(feature, group, height * width, height * width)
