"""A dense layer in, convolutions out: how the parts of this room work together.

No process ever holds the whole weight matrix. What crosses processes: numbers per unit, windows of
at most ``sampled_units`` units, sums of normal equations, and the non-zeros of left-over units.

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
    shuffled,
)
from dense2conv.structure.placement import Placement
from dense2conv.structure.search import Search

NULL_STATISTICS = ("radius", "participation", "entropy", "window_mass")
NULL_ROWS = 64  # rows shuffled at a time


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
    disagree, values are not finite or ``config`` is not valid. Deterministic.
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
        if not bool(torch.isfinite(tensor).all()):
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
    z = work.targets.z  # (n, m)
    variance = (z - z.mean(1, keepdim=True)).square().mean(1)
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
    left_unit, left_input, left_value = _left_over_weights(work, left)
    layer = ExtractedLayer(
        work.geometry, kernels.to(weight.dtype), lattices, padding, fields["kernel"], y, x,
        fields["gain"], left_unit, left_input, left_value,
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
    for start in range(0, len(work.weight), NULL_ROWS):
        rows = [
            shuffled(work.weight[i : i + 1], generator.manual_seed(int(work.own[i])))
            for i in range(start, min(start + NULL_ROWS, len(work.weight)))
        ]
        measured = receptive_fields(torch.cat(rows), work.geometry, work.window)
        for name in NULL_STATISTICS:
            parts[name].append(getattr(measured, name))
    empty = [work.power.new_zeros(0)]
    return {f"null_{name}": torch.cat(values or empty) for name, values in parts.items()}


def _left_over_weights(work: Search, left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Non-zeros of the left-over units of all processes, by unit: unit, input, value (nnz,)."""
    rows = left.nonzero()[:, 0]
    row, column = work.weight[rows].nonzero(as_tuple=True)
    unit = work.own[rows][row]
    # Processes hold ascending units, so each one's non-zeros come after those of the ones before.
    counts = torch.zeros(work.axis.size, dtype=torch.float64, device=work.device)
    counts[work.axis.rank] = len(row)
    counts = work.axis.sum(counts).long()
    slot = torch.arange(len(row), device=work.device) + counts[: work.axis.rank].sum()
    total = int(counts.sum())
    values = work.weight[rows][row, column]
    return (
        work.join(slot, unit, total).long(),
        work.join(slot, column, total).long(),
        work.join(slot, values, total).to(work.weight.dtype),
    )


def _recounted(lattice: Lattice, k: int, kernel: Tensor, y: Tensor, x: Tensor) -> Lattice:
    """The lattice with the coverage of the units that stayed on it."""
    mine = kernel == k
    return lattice.covered_by(y[mine], x[mine]) if bool(mine.any()) else lattice
