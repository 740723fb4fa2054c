"""The search for kernels, places and padding, step by step.

Shapes:

    n   own units      d   units of the layer      D   inputs      K   kernels      s   their side
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dense2conv.shapes import Axis, Geometry
from dense2conv.structure.config import ExtractConfig
from dense2conv.structure.fitting import (
    MAX_MOMENTS,
    Fit,
    Moments,
    Targets,
    evaluate,
    grow,
    refine,
    weakest_kernel,
    without,
)
from dense2conv.structure.grid import InputGrid
from dense2conv.structure.lattice import Lattice, fit_lattice
from dense2conv.structure.locality import receptive_fields, row_chunks
from dense2conv.structure.placement import Placement, agreement, place_units
from dense2conv.structure.translation import Crops, crops, cut_kernels, find_templates, kernel_side

CLEAR_WIN = 0.8  # circular padding must leave this little of the next best one's residual
MIN_AGREEMENT = 0.5  # correlation of a unit's own weights with its kernel, else it is left over
HELD = 0.95  # share of the units' mean |w| that a kernel's window must hold
PREFERENCE = ("zeros", "reflect", "replicate", "circular")


class Search:
    """The steps of one extraction and the state they share; every process calls the same ones.

    weight: (n, D) own rows; inputs: (m, D) training inputs.
    """

    def __init__(
        self, weight: Tensor, num_units: int, geometry: Geometry, inputs: Tensor,
        config: ExtractConfig, axis: Axis,
    ) -> None:  # fmt: skip
        self.weight, self.num_units, self.geometry = weight.detach(), num_units, geometry
        self.config, self.axis = config, axis
        self.device = weight.device
        self.own = torch.tensor(list(axis.shard(num_units)), dtype=torch.int64, device=self.device)
        self.grid = InputGrid(geometry, self.device)
        self.window = config.window or 5
        self.fields = receptive_fields(self.weight, geometry, self.window)
        self.targets = Targets.of(self.weight, inputs, self.grid)
        self.power = self.targets.power
        self.non_zeros = torch.zeros_like(self.own)
        for rows in row_chunks(*weight.shape):  # counting takes eight bytes a weight
            self.non_zeros[rows] = self.weight[rows].count_nonzero(dim=1)

    # --- shared tools -----------------------------------------------------------------------------

    def total(self, values: Tensor) -> float:
        """Sum over the own units, then over processes."""
        return float(self.axis.sum(values.double().sum()))

    def join(self, index: Tensor, values: Tensor, total: int) -> Tensor:
        """Rows that processes hold at ``index`` of ``total``, together on every process."""
        whole = torch.zeros(total, *values.shape[1:], dtype=values.dtype, device=self.device)
        whole[index] = values
        return self.axis.sum(whole)

    def place(self, kernels: Tensor, padding: str) -> Placement:
        fields = self.fields
        return place_units(
            self.weight, self.grid, fields.centre_y, fields.centre_x, kernels, padding
        )

    def evaluate(
        self, placement: Placement, kernels: Tensor, padding: str, units: Tensor | None = None
    ) -> Fit:
        """How every kernel explains the own units (or some of them) at their places."""
        units = torch.arange(len(self.weight), device=self.device) if units is None else units
        y, x = placement.y[units], placement.x[units]
        return evaluate(self.targets, units, self.grid, y, x, kernels, padding)

    def moments(
        self, chosen: Tensor, placement: Placement, kernels: Tensor, padding: str
    ) -> tuple[Moments, Tensor]:
        """Second moments of chosen (n,) own units, thinned evenly to what memory holds."""
        allowed = max(1, MAX_MOMENTS // kernels[0].numel() ** 2) * self.axis.size
        step = -(-int(self.total(chosen)) // allowed)
        units = chosen.nonzero()[:, 0]
        units = units[self.own[units] % max(1, step) == 0]
        half = kernels.shape[-1] // 2
        y, x = placement.y[units], placement.x[units]
        return Moments.of(self.targets, units, self.grid, y, x, half, padding), units

    # --- the steps, in order ----------------------------------------------------------------------

    def find_kernels(self) -> tuple[Tensor, str]:
        """Kernels (K, C, s, s) and padding: clusters of translates, then least squares."""
        config = self.config
        side = config.window or config.max_window
        sample = self._sampled_crops(side - 1, self.fields.alive)
        found = find_templates(sample, config.max_kernels, config.min_correlation, config.min_units)
        if not len(found.values):
            return sample.values.new_zeros(0, self.grid.channels, 1, 1), "none"
        side = config.window or kernel_side(found, HELD, config.max_window)
        kernels = cut_kernels(found, side)
        kernels = self._fit_inside(kernels)
        padding = self._choose_padding(kernels)

        # What no kernel explains even with padding may hold kernels of its own, e.g. at the edges.
        placement = self.place(kernels, padding)
        unlike = self.fields.alive & (placement.correlation < config.min_correlation)
        room = config.max_kernels - len(kernels)
        if room > 0 and self.total(unlike) >= config.min_units:
            sample = self._sampled_crops(side - 1, unlike)
            found = find_templates(sample, room, config.min_correlation, config.min_units)
            if len(found.values):
                kernels = torch.cat([kernels, cut_kernels(found, side)])
        return kernels, padding

    def _sampled_crops(self, half: int, wanted: Tensor) -> Crops:
        """Crops of wanted (n,) units of all processes, at most ``sampled_units``."""
        everywhere = self.join(self.own, wanted.to(torch.uint8), self.num_units) > 0
        chosen = everywhere.nonzero()[:, 0]
        chosen = chosen[:: max(1, -(-len(chosen) // self.config.sampled_units))]
        here = torch.isin(chosen, self.own)
        index, slot = (
            chosen[here] - (int(self.own[0]) if len(self.own) else 0),
            here.nonzero()[:, 0],
        )
        y, x = self.fields.centre_y[index], self.fields.centre_x[index]
        own = crops(self.weight, self.geometry, y, x, half, index)
        joined = [
            self.join(slot, tensor, len(chosen))
            for tensor in (own.values, own.count, own.energy, own.clear.to(torch.uint8))
        ]
        return Crops(joined[0], joined[1], joined[2], joined[3] > 0)

    def _fit_inside(self, kernels: Tensor) -> Tensor:
        """Least squares on units that no padding concerns."""
        placement = self.place(kernels, "zeros")
        like = placement.correlation >= self.config.min_correlation
        inside = like & self.grid.inside(placement.y, placement.x, kernels.shape[-1] // 2)
        chosen = inside if self.total(inside) > 0 else like
        if self.total(chosen) == 0:
            return kernels
        moments, units = self.moments(chosen, placement, kernels, "zeros")
        flat, _, _ = refine(
            moments, kernels.flatten(1), placement.kernel[units], self.config.min_r2, self.axis
        )
        return flat.view_as(kernels)

    def _choose_padding(self, kernels: Tensor) -> str:
        """The padding that leaves the least output power unexplained; circular must win clearly."""
        if self.config.padding != "auto":
            return self.config.padding
        half, smallest = kernels.shape[-1] // 2, min(self.grid.height, self.grid.width)
        if half == 0:
            return "none"
        possible = ["zeros", "replicate"]
        possible += ["reflect"] if half < smallest else []
        possible += ["circular"] if half <= smallest else []
        # Units that sit well inside with the zeros outside do so with any padding.
        plain = self.place(kernels, "zeros")
        unlike = plain.correlation < self.config.min_correlation
        concerned = unlike | ~self.grid.inside(plain.y, plain.x, half)
        units = (concerned & self.fields.alive).nonzero()[:, 0]
        residual = {}
        for padding in sorted(possible, key=PREFERENCE.index):
            placement = self.place(kernels, padding)
            fit = self.evaluate(placement, kernels, padding, units).explained
            own = fit.gather(1, placement.kernel[units, None])[:, 0]
            residual[padding] = self.total((1 - own) * self.power[units])
        wrapped = residual.pop("circular", math.inf)
        # Equally good up to rounding: the first.
        scale = self.total(self.power)
        best = min(residual, key=lambda padding: round(residual[padding] / max(scale, 1e-300), 9))
        return "circular" if wrapped < CLEAR_WIN * residual[best] - 1e-9 * scale else best

    def fit_kernels(self, kernels: Tensor, padding: str) -> tuple[Tensor, Placement, Tensor]:
        """All units, all kernels, on outputs: refine, add kernels, place again, refine."""
        n, config = len(self.weight), self.config
        zeros = self.own.new_zeros(n)
        nothing = Placement(zeros, zeros, zeros, *(self.power.new_zeros(n) for _ in range(2)))
        if not len(kernels):
            return kernels, nothing, self.power.new_zeros(n)
        placement = self.place(kernels, padding)
        like = placement.correlation >= MIN_AGREEMENT
        if self.total(like) == 0:
            return kernels[:0], nothing, self.power.new_zeros(n)
        moments, units = self.moments(like, placement, kernels, padding)
        flat, _, _ = refine(
            moments, kernels.flatten(1), placement.kernel[units], config.min_r2, self.axis
        )
        flat, _, _ = grow(
            moments, flat, self.own[units], self.non_zeros[units], self.num_units,
            config, self.axis,
        )  # fmt: skip
        kernels = flat.view(-1, *kernels.shape[1:])
        explained = self._best(placement, kernels, padding)
        # A unit moves where the new kernels explain it better, weights and outputs.
        moved = self.place(kernels, padding)
        better = self._best(moved, kernels, padding)
        moves = better > explained + 1e-6
        for name in ("kernel", "y", "x", "gain", "correlation"):
            mine, theirs = getattr(placement, name), getattr(moved, name)
            setattr(placement, name, torch.where(moves, theirs, mine))
        return kernels, placement, torch.where(moves, better, explained)

    def _best(self, placement: Placement, kernels: Tensor, padding: str) -> Tensor:
        """Give every unit the kernel that explains it best where it is; share explained."""
        fit = self.evaluate(placement, kernels, padding)
        score = fit.explained.round(decimals=9)
        placement.kernel = score.argmax(1)
        placement.gain = fit.gain.gather(1, placement.kernel[:, None])[:, 0]
        placement.correlation = agreement(self.weight, self.grid, placement, kernels, padding)
        return fit.explained.gather(1, placement.kernel[:, None])[:, 0]

    def settle(
        self, kernels: Tensor, placement: Placement, explained: Tensor, padding: str
    ) -> tuple[Tensor, Placement, Tensor, list[Lattice]]:
        """Leave over what does not fit, drop kernels that too few repeat, fit lattices and refit.

        A unit left over, or dead, gets kernel -1.
        """
        config = self.config
        while True:
            kept = self.fields.alive & (explained >= config.min_r2) & (len(kernels) > 0)
            kept &= placement.correlation >= MIN_AGREEMENT
            if padding == "none":
                kept &= self.grid.inside(placement.y, placement.x, kernels.shape[-1] // 2)
            weak = None
            if len(kernels):
                weak = weakest_kernel(
                    placement.kernel, kept, self.non_zeros, kernels, config, self.axis
                )
            if weak is None:
                break
            kernels = without(kernels, weak)
            if len(kernels):
                explained = self._best(placement, kernels, padding)

        label = torch.where(kept, placement.kernel, -1)
        joined = [self.axis.gather(t, self.num_units) for t in (label, placement.y, placement.x)]
        lattices = []
        for k in range(len(kernels)):
            y, x = joined[1][joined[0] == k], joined[2][joined[0] == k]
            lattices.append(fit_lattice(y, x))
            off = (label == k) & ~lattices[k].holds(placement.y, placement.x)
            label = torch.where(off, -1, label)
        if len(kernels):
            on = label >= 0
            moments, units = self.moments(on, placement, kernels, padding)
            flat, _, _ = refine(
                moments, kernels.flatten(1), label[units], config.min_r2 / 2, self.axis
            )
            kernels = flat.view_as(kernels)
            fit = self.evaluate(placement, kernels, padding)
            column = label.clamp_min(0)[:, None]
            own = fit.explained.gather(1, column)[:, 0]
            explained = torch.where(on, own, fit.explained.amax(1))
            placement.gain = torch.where(on, fit.gain.gather(1, column)[:, 0], 0.0)
            placement.kernel = label.clamp_min(0)
            close = agreement(self.weight, self.grid, placement, kernels, padding)
            placement.correlation = torch.where(on, close, placement.correlation)
        placement.kernel = label
        return kernels, placement, explained, lattices

    def simplest(self, padding: str, placement: Placement, kernels: Tensor) -> str:
        """``none`` where no unit's window leaves the grid."""
        inside = self.grid.inside(placement.y, placement.x, kernels.shape[-1] // 2)
        crossing = (placement.kernel >= 0) & ~inside
        return padding if self.total(crossing) else "none"
