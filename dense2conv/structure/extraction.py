"""A dense layer in, convolutions out: how the parts of this room work together.

No process ever holds the whole weight matrix. What crosses processes: numbers per unit, windows of
at most ``sampled_units`` units, sums of normal equations, and the non-zeros of left-over units, which
are refused where they are more than a process's share of the layer. Beside that share and the inputs
a process holds its own units' outputs, 128 MiB of second moments at most, and pieces of rows.

    n   own units      d   units of the layer      D   inputs      K   kernels      p   taps
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dense2conv.shapes import Axis, Geometry, InputError
from dense2conv.structure.config import ExtractConfig
from dense2conv.structure.discovery import Channel, discovered_grid, find_channels
from dense2conv.structure.emission import ExtractedLayer
from dense2conv.structure.lattice import Lattice
from dense2conv.structure.locality import (
    check_weight,
    random_radius,
    receptive_fields,
    row_chunks,
    shuffled,
)
from dense2conv.structure.placement import Placement
from dense2conv.structure.search import Search

NULL_STATISTICS = ("radius", "participation", "entropy", "window_mass")
BUFFER = 1 << 26  # bytes that left-over weights may take beyond a process's share of the layer


@dataclass
class LayerExtraction:
    """What was found in one layer; the same on every process.

    layer: the module. fields: (d,) per unit: alive, centre_y, centre_x, radius, participation,
    entropy, window_mass (and null_… of the last four: the same weights at shuffled inputs), kernel
    (-1: left over or dead), gain, correlation (of weights) and r2 (of outputs on the training
    inputs, given kernels only); channel, place_y and place_x: where ``geometry`` has the unit.
    lattices: per kernel stride and offset as [y, x], coverage, num_units. channels: kernels that
    are variants of one and tile together, with the lattice they share. geometry: the grid that
    this layer is for the next one, in steps of the channels' common stride from the first place;
    left-over units in one extra last channel at the step nearest their centre, dead units at none.
    """

    layer: ExtractedLayer
    fields: dict[str, Tensor]
    lattices: list[dict[str, Any]]
    channels: list[Channel]
    padding: str
    random_radius: float
    geometry: Geometry


@torch.no_grad()
def extract_layer(
    weight: Tensor,
    bias: Tensor | None,
    num_units: int,
    geometry: Geometry,
    inputs: Tensor,
    config: ExtractConfig,
    axis: Axis | None = None,
) -> LayerExtraction:
    """Find the convolution in a dense layer whose rows are spread over ``axis``.

    weight: (n, D) own rows and bias: (n,) or None, as ``axis.shard(num_units)``; geometry: of the D
    inputs; inputs: (m, D) training inputs, the same on every process. Raises InputError if shapes
    disagree, values are not finite, ``config`` is not valid, or left-over units have more weights
    than a process may hold. Deterministic.
    """
    axis = Axis() if axis is None else axis
    config.validate()
    _check(weight, bias, num_units, geometry, inputs, axis)
    work = Search(weight, num_units, geometry, inputs[: config.samples], config, axis)
    kernels, padding = work.find_kernels()
    kernels, placement, explained = work.fit_kernels(kernels, padding)
    kernels, placement, explained, lattices = work.settle(kernels, placement, explained, padding)
    padding = work.simplest(padding, placement, kernels)
    return _emit(work, kernels, placement, explained, lattices, padding, bias)


def _check(
    weight: Tensor,
    bias: Tensor | None,
    num_units: int,
    geometry: Geometry,
    inputs: Tensor,
    axis: Axis,
) -> None:
    check_weight(weight, geometry)
    own = axis.shard(num_units)
    if len(weight) != len(own):
        raise InputError(
            f"process {axis.rank} of {axis.size} holds {len(weight)} rows of {num_units}, but its "
            f"shard is {len(own)}; pass the rows {own}"
        )
    if bias is not None and bias.shape != (len(weight),):
        raise InputError(f"bias is {tuple(bias.shape)} for {len(weight)} rows; pass one a row")
    if inputs.ndim != 2 or inputs.shape[1] != len(geometry) or not len(inputs):
        raise InputError(
            f"inputs are {tuple(inputs.shape)}; pass (m, {len(geometry)}) training inputs, m ≥ 1"
        )
    for name, tensor in (("weight", weight), ("inputs", inputs)):
        pieces = row_chunks(*tensor.shape)
        if not all(bool(torch.isfinite(tensor[rows]).all()) for rows in pieces):
            raise InputError(f"{name} has values that are not finite; extract from a sound run")


def _emit(
    work: Search,
    kernels: Tensor,
    placement: Placement,
    explained: Tensor,
    lattices: list[Lattice],
    padding: str,
    bias: Tensor | None,
) -> LayerExtraction:
    """Gather the numbers of all units and build the module, the same on every process."""
    d, axis, weight = work.num_units, work.axis, work.weight
    variance = work.targets.variance
    unexplained = (1 - explained) * work.power / variance.clamp_min(1e-300)
    own = {
        **work.fields.as_dict(),
        **_null_fields(work),
        "kernel": placement.kernel,
        "gain": placement.gain,
        "correlation": placement.correlation,
        "r2": torch.where(variance > 0, 1 - unexplained, 0.0) * work.fields.alive,
    }
    # Not every backend gathers booleans.
    fields = {name: axis.gather(values.to(_wire(values)), d) for name, values in own.items()}
    fields["alive"] = fields["alive"].bool()
    y, x = axis.gather(placement.y, d), axis.gather(placement.x, d)
    lattices = [_recounted(k, i, fields["kernel"], y, x) for i, k in enumerate(lattices)]

    left = work.fields.alive & (placement.kernel < 0)
    layer = ExtractedLayer(
        work.geometry, kernels.to(weight.dtype), lattices, padding, fields["kernel"], y, x,
        fields["gain"], *_left_over_weights(work, left),
        None if bias is None else axis.gather(bias.detach(), d),
    )  # fmt: skip
    described = [
        {
            "stride": [k.stride_y, k.stride_x],
            "offset": [k.offset_y, k.offset_x],
            "coverage": k.coverage,
            "num_units": int((fields["kernel"] == i).sum()),
        }
        for i, k in enumerate(lattices)
    ]
    channels = find_channels(kernels, fields["kernel"], y, x, work.config.min_correlation)
    grid = discovered_grid(channels, fields, y, x, work.config.split_signs, work.geometry.shape)
    fields["place_y"], fields["place_x"] = grid.y.to(y), grid.x.to(x)
    fields["channel"] = grid.channel.to(y)
    radius = random_radius(work.geometry)
    return LayerExtraction(layer, fields, described, channels, padding, radius, grid)


def _wire(values: Tensor) -> torch.dtype:
    return torch.uint8 if values.dtype == torch.bool else values.dtype


def _null_fields(work: Search) -> dict[str, Tensor]:
    """The statistics of the own rows with their weights at shuffled inputs, one seed a unit."""
    generator = torch.Generator(work.device)
    parts: dict[str, list[Tensor]] = {name: [] for name in NULL_STATISTICS}
    for some in row_chunks(*work.weight.shape):
        rows = [
            shuffled(work.weight[i : i + 1], generator.manual_seed(int(work.own[i])))
            for i in range(some.start, some.stop)
        ]
        measured = receptive_fields(torch.cat(rows), work.geometry, work.window)
        for name in NULL_STATISTICS:
            parts[name].append(getattr(measured, name))
    empty = [work.power.new_zeros(0)]
    return {f"null_{name}": torch.cat(values or empty) for name, values in parts.items()}


def _left_over_weights(work: Search, left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Non-zeros of the left-over units of all processes, by unit: unit, input, value (nnz,)."""
    units = left.nonzero()[:, 0]
    # Processes hold ascending units, so each one's non-zeros come after those of the ones before.
    counts = torch.zeros(work.axis.size, dtype=torch.int64, device=work.device)
    counts[work.axis.rank] = work.non_zeros[units].sum()
    counts = work.axis.sum(counts)
    total = int(counts.sum())
    _refuse_too_many(work, total)
    slot = torch.arange(int(counts[work.axis.rank]), device=work.device)
    slot += counts[: work.axis.rank].sum()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for some in row_chunks(len(units), work.weight.shape[1]):
        rows = work.weight[units[some]]
        row, column = rows.nonzero(as_tuple=True)
        unit = work.own[units[some]][row]
        found.append((unit.int(), column.int(), rows[row, column]))
    nothing = slot[:0].int(), slot[:0].int(), work.weight.new_empty(0)
    own = (torch.cat(parts) for parts in zip(*(found or [nothing]), strict=True))
    unit, column, value = (work.join(slot, part, total) for part in own)
    return unit, column, value


def _refuse_too_many(work: Search, num_weights: int) -> None:
    """Raise InputError where left-over rows would be more than a process may hold of the layer."""
    weight = work.weight
    held = work.axis.shard(work.num_units, 0)
    share = len(held) * weight.shape[1] * weight.itemsize
    needed = num_weights * (weight.itemsize + 2 * torch.int32.itemsize)
    if needed > share + BUFFER or num_weights > torch.iinfo(torch.int32).max:
        raise InputError(
            f"units that no kernel explains have {num_weights} weights, {needed / 2**20:.0f} MiB on "
            f"every process, which holds {share / 2**20:.0f} MiB of the layer: there is no convolution "
            "in it; prune more with prune.sparsity, lower extract.min_r2, or use fewer processes"
        )


def _recounted(lattice: Lattice, k: int, kernel: Tensor, y: Tensor, x: Tensor) -> Lattice:
    """The lattice with the coverage of the units that stayed on it."""
    mine = kernel == k
    return lattice.covered_by(y[mine], x[mine]) if bool(mine.any()) else lattice
