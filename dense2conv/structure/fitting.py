"""Kernels by least squares on data: z_u ≈ gain_u · <kernel, padded image at u's place>.

A mean of the units' own weights is no substitute: the image's large mean power shows every error
of a kernel's sum. Normal equations are summed over processes; units' targets stay where they are.

    M   samples      n   own units      K   kernels      p   taps of a kernel, C·s²
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dense2conv.shapes import Axis
from dense2conv.structure.config import ExtractConfig
from dense2conv.structure.grid import InputGrid
from dense2conv.structure.locality import row_chunks

MAX_MOMENTS = 1 << 24  # numbers of second moments held: 128 MiB in float64
MAX_ITERATIONS = 30
_PRODUCT = 8  # times CHUNK_NUMBERS: of rows and of samples that are multiplied
COARSE = 1e-4  # relative change of kernels at which a trial has settled
RIDGE = 1e-10  # of the mean tap power, towards the kernel of the step before
NUM_CANDIDATES = 256  # units whose own kernel is tried as a new one
NUM_TRIALS = 4  # of them that are followed to the end
NOTHING_LEFT = 1e-10  # share of the targets' power below which a fit is exact
MIN_POWER = 1e-200  # of taps that see nothing: its ridge must have a finite reciprocal


@dataclass
class Targets:
    """Linear outputs of the own units on the training inputs, without bias.

    cells: (C, H·W, M) inputs on their grid; no copy of inputs that are an image whose samples lie
    next to each other. z: (n, M), computed in float64 and kept in the precision of the weights.
    Samples come last, so that a patch is a choice of rows.
    """

    cells: Tensor
    z: Tensor

    @classmethod
    def of(cls, weight: Tensor, inputs: Tensor, grid: InputGrid) -> Targets:
        """weight: (n, D) own rows; inputs: (M, D)."""
        digits = torch.promote_types(weight.dtype, torch.float32)
        z = weight.new_empty(len(weight), len(inputs), dtype=digits)
        # Larger pieces than elsewhere: each of the rows meets each of the samples.
        for some in row_chunks(len(weight), weight.shape[1] // _PRODUCT):
            rows = weight[some].double()
            for samples in row_chunks(len(inputs), inputs.shape[1] // _PRODUCT):
                z[some, samples] = (rows @ inputs[samples].double().T).to(z.dtype)
        return cls(grid.scatter(inputs).flatten(2).permute(1, 2, 0).contiguous(), z)

    @cached_property
    def power(self) -> Tensor:
        """(n,) float64 mean square of each target."""
        return self._mean_squares(lambda z: z)

    @cached_property
    def variance(self) -> Tensor:
        """(n,) of each target."""
        return self._mean_squares(lambda z: z - z.mean(1, keepdim=True))

    def _mean_squares(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        means = self.z.new_empty(len(self.z), dtype=torch.float64)
        for some in row_chunks(*self.z.shape):
            means[some] = of(self.z[some].double()).square().mean(1)
        return means

    def columns(self, units: Tensor) -> Tensor:
        """(n, M, 1) float64: the targets of some own units."""
        return self.z[units, :, None].double()

    def patches(self, grid: InputGrid, y: Tensor, x: Tensor, half: int, padding: str) -> Tensor:
        """(n, p, M) float64: what a kernel at each place sees."""
        taps = grid.window(y, x, half, padding)  # (n, s²)
        shape = len(taps), len(self.cells), taps.shape[1], self.z.shape[1]
        seen = self.z.new_empty(shape, dtype=torch.float64)
        for channel, rows in enumerate(self.cells):
            seen[:, channel] = rows[taps.clamp_min(0)]
        outside = (taps < 0).nonzero()
        seen[outside[:, 0], :, outside[:, 1]] = 0
        return seen.flatten(1, 2)  # (n, C·s², M)


@dataclass
class Fit:
    """Share of each unit's mean square that a kernel explains, with which gain: (n, K) each."""

    explained: Tensor
    gain: Tensor


@dataclass
class Moments:
    """Sufficient statistics of the own units at their places: means over samples.

    taps (n, p, p) patch·patchᵀ, cross (n, p) patch·z, power (n,) z².
    """

    taps: Tensor
    cross: Tensor
    power: Tensor

    @classmethod
    def of(
        cls, targets: Targets, units: Tensor, grid: InputGrid, y: Tensor, x: Tensor,
        half: int, padding: str,
    ) -> Moments:  # fmt: skip
        """units: indices among the own ones; y, x: their places."""
        p, num_samples = grid.channels * (2 * half + 1) ** 2, targets.z.shape[1]
        taps = targets.power.new_zeros(len(units), p, p)
        cross = taps.new_zeros(len(units), p)
        for rows in row_chunks(len(units), num_samples * p):
            patches = targets.patches(grid, y[rows], x[rows], half, padding)
            taps[rows] = patches @ patches.mT / num_samples
            cross[rows] = (patches @ targets.columns(units[rows]))[..., 0] / num_samples
        return cls(taps, cross, targets.power[units])

    def fit(self, kernels: Tensor) -> Fit:
        """How well each kernel (K, p) explains each unit, at its best gain."""
        product = self.cross @ kernels.T  # (n, K)
        norm = torch.einsum("kp,npq,kq->nk", kernels, self.taps, kernels)
        return _fit(product, norm, self.power)

    def own_kernels(self, units: Tensor) -> Tensor:
        """Each unit's own least-squares kernel: (q,) indices → (q, p)."""
        eye = torch.eye(self.cross.shape[1], dtype=self.cross.dtype, device=self.cross.device)
        power = self.taps[units].diagonal(dim1=1, dim2=2).mean(1).clamp_min(MIN_POWER)
        ridge = 1e-9 * power.view(-1, 1, 1) * eye
        return torch.linalg.solve(self.taps[units] + ridge, self.cross[units])


def _fit(product: Tensor, norm: Tensor, power: Tensor) -> Fit:
    gain = torch.where(norm > 0, product / norm.clamp_min(1e-300), 0.0)
    explained = gain * product / power[:, None].clamp_min(1e-300)
    return Fit(explained.clamp(0, 1), gain)


def evaluate(
    targets: Targets,
    units: Tensor,
    grid: InputGrid,
    y: Tensor,
    x: Tensor,
    kernels: Tensor,
    padding: str,
) -> Fit:
    """As Moments.fit for some own units at places y and x, streamed; kernels: (K, C, s, s)."""
    half, num_samples = kernels.shape[-1] // 2, targets.z.shape[1]
    flat = kernels.flatten(1)  # (K, p)
    product = targets.power.new_zeros(len(y), len(kernels))
    norm = torch.zeros_like(product)
    for rows in row_chunks(len(y), num_samples * max(1, flat.shape[1])):
        response = flat @ targets.patches(grid, y[rows], x[rows], half, padding)  # (chunk, K, M)
        product[rows] = (response @ targets.columns(units[rows]))[..., 0] / num_samples
        norm[rows] = response.square().mean(2)
    return _fit(product, norm, targets.power[units])


def refine(
    moments: Moments,
    kernels: Tensor,
    label: Tensor | None,
    min_explained: float,
    axis: Axis,
    tolerance: float = 1e-12,
) -> tuple[Tensor, Tensor, Tensor]:
    """Alternate gains and kernels, each least squares given the other, until they settle.

    Without ``label`` (n,) every unit also takes the kernel that explains it best at its place.
    Units of which less than ``min_explained`` is explained do not pull at the kernels. Returns
    kernels (K, p), explained (n,) and kernel (n,).
    """
    fit = moments.fit(kernels)
    free = label is None
    label = fit.explained.argmax(1) if label is None else label
    for _ in range(MAX_ITERATIONS):
        before = kernels
        own = fit.explained.gather(1, label[:, None])[:, 0]
        gain = fit.gain.gather(1, label[:, None])[:, 0] * (own >= min_explained)
        kernels = _solve(moments, kernels, label, gain, axis)
        fit = moments.fit(kernels)
        if free:
            label = fit.explained.argmax(1)
        scale = before.abs().amax().clamp_min(1e-300)
        change = float((kernels - before).abs().amax() / scale)
        if change < tolerance:
            break
    return kernels, fit.explained.gather(1, label[:, None])[:, 0], label


def _solve(moments: Moments, kernels: Tensor, label: Tensor, gain: Tensor, axis: Axis) -> Tensor:
    """Kernels given labels and gains, scaled to an rms gain of 1 and a positive largest tap."""
    num_kernels, p = kernels.shape
    sums = kernels.new_zeros(num_kernels, p * p + p + 2)
    # Of every unit, 0 where it is another kernel's: choosing the units' moments would copy them.
    gains = gain * (label == torch.arange(num_kernels, device=label.device)[:, None])  # (K, n)
    squares = gains.square()
    sums[:, : p * p] = squares @ moments.taps.flatten(1)
    sums[:, p * p : -2] = gains @ moments.cross
    sums[:, -2], sums[:, -1] = squares.sum(1), gains.count_nonzero(dim=1)
    sums = axis.sum(sums)
    system = sums[:, : p * p].unflatten(1, (p, p))  # (K, p, p)
    power = system.diagonal(dim1=1, dim2=2).mean(1).clamp_min(MIN_POWER)
    ridge = RIDGE * power.view(-1, 1, 1) * torch.eye(p, dtype=sums.dtype, device=sums.device)
    missing = sums[:, p * p : -2] - (system @ kernels[..., None])[..., 0]  # (K, p)
    solved = kernels + torch.linalg.solve(system + ridge, missing)
    scale = (sums[:, -2] / sums[:, -1].clamp_min(1)).sqrt()  # rms gain
    solved = solved * torch.where(scale > 0, scale, 1.0)[:, None]
    largest = solved.gather(1, solved.abs().argmax(1, keepdim=True))
    return solved * torch.where(largest < 0, -1.0, 1.0)


def grow(
    moments: Moments,
    kernels: Tensor,
    units: Tensor,
    non_zeros: Tensor,
    num_units: int,
    config: ExtractConfig,
    axis: Axis,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add kernels while one removes at least ``min_improvement`` of what is left unexplained.

    Each must be repeated by ``min_units`` and be shorter than the rows it stands for: fewer taps
    than its units have weights, ``non_zeros`` (n,). Kernels given that are not go first.

    A new kernel starts as the least-squares kernel of the one unit whose own helps all units most;
    then all are refined together. ``units``: (n,) the own units' indices among the ``num_units`` of
    the layer, which decide the candidates, so that any number of processes tries the same ones.
    Returns as :func:`refine`.
    """
    min_explained = config.min_r2
    best = refine(moments, kernels, None, min_explained, axis, COARSE)
    while len(best[0]) > 1:  # kernels that lost their units to others
        good = best[1] >= min_explained
        weak = weakest_kernel(best[2], good, non_zeros, best[0], config, axis)
        if weak is None:
            break
        best = refine(moments, without(best[0], weak), None, min_explained, axis, COARSE)
    total = float(axis.sum(moments.power.sum()))
    while len(best[0]) < config.max_kernels:
        residual = (1 - best[1]) * moments.power  # (n,)
        left = float(axis.sum(residual.sum()))
        if left <= NOTHING_LEFT * total:
            break
        candidates = _candidates(residual, units, num_units, axis)
        own = kernels.new_zeros(len(candidates), kernels.shape[1])
        here = torch.isin(candidates, units)
        where = torch.searchsorted(units, candidates[here])
        own[here] = moments.own_kernels(where)
        own = axis.sum(own)  # (q, p)
        explained = moments.fit(own).explained  # (n, q)
        helped = (explained - best[1][:, None]).clamp_min(0) * (explained >= min_explained)
        helped = axis.sum((helped * moments.power[:, None]).sum(0))  # (q,)
        order = (helped / left).round(decimals=9).argsort(descending=True, stable=True)
        for chosen in order[:NUM_TRIALS].tolist():
            start = torch.cat([best[0], own[None, chosen]])
            trial = refine(moments, start, None, min_explained, axis, COARSE)
            good = trial[1] >= min_explained
            enough = weakest_kernel(trial[2], good, non_zeros, start, config, axis) is None
            now = float(axis.sum(((1 - trial[1]) * moments.power).sum()))
            if now <= (1 - config.min_improvement) * left and enough:
                best = trial
                break
        else:
            break
    return refine(moments, best[0], None, min_explained, axis)


def weakest_kernel(
    label: Tensor,
    good: Tensor,
    non_zeros: Tensor,
    kernels: Tensor,
    config: ExtractConfig,
    axis: Axis,
) -> int | None:
    """The kernel with fewest units, of those not worth having; None if all are.

    One is worth having if ``min_units`` repeat it and together have at least as many weights as it
    has taps: otherwise their own rows are the shorter description. label, good, non_zeros: (n,)
    kernel of each own unit, whether it explains the unit, and the unit's number of weights.
    """
    taps, num_kernels = kernels[0].numel(), len(kernels)
    members = torch.bincount(label[good], minlength=num_kernels).double()
    weights = torch.bincount(label[good], non_zeros[good].double(), minlength=num_kernels)
    members, weights = axis.sum(torch.stack([members, weights]))
    weak = (members < config.min_units) | (weights < taps)
    return int(torch.where(weak, members, torch.inf).argmin()) if bool(weak.any()) else None


def without(kernels: Tensor, index: int) -> Tensor:
    """All kernels but one."""
    assert 0 <= index < len(kernels), (index, len(kernels))
    return torch.cat([kernels[:index], kernels[index + 1 :]])


def _candidates(residual: Tensor, units: Tensor, num_units: int, axis: Axis) -> Tensor:
    """Units of the layer, from the worst explained down, at most NUM_CANDIDATES evenly spread."""
    everywhere = residual.new_zeros(num_units).index_copy(0, units, residual)
    everywhere = axis.sum(everywhere)
    order = (everywhere / everywhere.max()).round(decimals=9).argsort(descending=True, stable=True)
    order = order[: int((everywhere > 0).sum())]
    step = max(1, -(-len(order) // NUM_CANDIDATES))
    return order[::step].sort().values
