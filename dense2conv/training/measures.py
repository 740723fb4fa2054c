"""What is measured of a run while it trains: its layers, their weights and receptive fields, its time.

m   samples     D   inputs of a layer     d   units of a layer, d/tp held here
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dense2conv.data import ImageSource
from dense2conv.models import DenseStack
from dense2conv.models.dense_stack import layer_name
from dense2conv.objectives import Terms
from dense2conv.parallel import Mesh
from dense2conv.parallel.engines import Engine
from dense2conv.shapes import Axis
from dense2conv.structure.locality import receptive_fields, row_chunks

_MAGNITUDES = (
    -6.0,
    1.0,
    70,
)  # decades of |w|: from, to, bins; what lies outside is in the end bins
_RADII_BINS = 50


class Histogram(NamedTuple):
    """``counts`` (n,) between ``edges`` (n + 1,)."""

    counts: NDArray[np.float64]
    edges: NDArray[np.float64]


class Fields(NamedTuple):
    """Some units' receptive fields: weights (n, D)."""

    weight: NDArray[np.float32]


Value = float | Histogram | Fields


def layer_metrics(
    stack: DenseStack, terms: Mapping[str, Terms], l1: Mapping[int, float | Tensor]
) -> dict[str, Tensor]:
    """Device scalars of the held layers, exact over all processes that hold rows of them.

    ``l1`` is each layer's λ; it is told where it is a tensor, since then it moves.

    Keys of layers after the first start with ``layer2/`` and so on; in the network scope the top
    layer's rate, power and objective are the run's and stand under their plain names too.
    """
    values: dict[str, Tensor] = {}
    for i in stack.indices:
        weight, d = stack.layer(i).weight.detach(), stack.layer(i).num_units
        # Norms along rows make no copy of the weights, as comparisons and sums to fp64 do.
        nonzero = torch.linalg.vector_norm(weight, 0, dim=1).double()  # (d/tp,)
        magnitude = torch.linalg.vector_norm(weight, 1, dim=1).double()
        counts = torch.stack([nonzero.sum(), (nonzero == 0).sum(), magnitude.sum()])
        counts = stack.rows.sum(counts)
        prefix = layer_prefix(i)
        values[f"{prefix}sparsity"] = 1 - counts[0] / (d * weight.shape[1])
        values[f"{prefix}dead"] = counts[1] / d
        strength = l1[i]
        if isinstance(strength, Tensor):
            values[f"{prefix}lambda"] = strength.clone()
        values[f"{prefix}l1"] = strength * counts[2] / d
        if layer_name(i) in terms:
            rate, power = terms[layer_name(i)]
            values[f"{prefix}rate"], values[f"{prefix}power"] = rate, power
            values[f"{prefix}objective"] = rate - power - values[f"{prefix}l1"]
    top = layer_name(stack.num_layers - 1)
    if stack.num_layers > 1 and terms.keys() == {top}:
        # One objective, that of the top layer; where there are more, the first stage's stands.
        values |= {key: values[f"{top}/{key}"] for key in ("rate", "power", "objective")}
    return values


def layer_prefix(index: int) -> str:
    """What the keys of a layer start with."""
    return "" if index == 0 else f"{layer_name(index)}/"


def magnitudes(weight: Tensor, rows_axis: Axis) -> Histogram:
    """How large the weights of a layer are that are not 0, in decades.

    weight: own rows of (d, D), spread over ``rows_axis``; all its processes call this.
    """
    low, high, num_bins = _MAGNITUDES
    counts = torch.zeros(num_bins, dtype=torch.float64, device=weight.device)
    for rows in row_chunks(*weight.shape):
        decades = weight[rows].abs().log10().clamp(min=-1e30)  # zeros lie far below
        inside = decades[decades > -1e30].clamp(low, high)
        counts += torch.histc(inside.float(), num_bins, low, high).double()
    edges = np.linspace(low, high, num_bins + 1)
    return Histogram(rows_axis.sum(counts).cpu().numpy(), edges)


def radii(radius: Tensor) -> Histogram:
    """Of the radii (d,) in pixels, NaN where a unit is dead."""
    live = radius[~radius.isnan()].cpu().numpy()
    return Histogram(*np.histogram(live, _RADII_BINS, (0.0, max(1.0, live.max(initial=0.0)))))


def layer_flops(widths: Sequence[int], network_scope: bool) -> float:
    """Operations an image takes in the products with all weights, forward and backward.

    The gradient of a layer's input is made only where an objective further up asks for it.

    Args:
        widths: pixels of an image, then units of each layer.
        network_scope: one objective at the top, instead of one a layer.
    """
    return sum(
        2.0 * inputs * units * (3 if network_scope and i else 2)
        for i, (inputs, units) in enumerate(pairwise(widths))
    )


def field_metrics(stack: DenseStack, source: ImageSource) -> dict[str, Value]:
    """How large the held layers' weights are, and the radii in pixels of the first one's live units."""
    values: dict[str, Value] = {}
    for i in stack.indices:
        weight = stack.layer(i).weight.detach()
        values[f"{layer_prefix(i)}magnitudes"] = magnitudes(weight, stack.rows)
        if i == 0:
            fields = receptive_fields(weight, source.geometry)
            radius = torch.where(fields.alive, fields.radius, torch.nan)
            radius = stack.rows.gather(radius, stack.layer(i).num_units)
            values |= {"radius": float(radius.nanmedian()), "radii": radii(radius)}
    return values


def shares_of_the_step(
    mesh: Mesh, engine: Engine, input_seconds: float, seconds: float
) -> dict[str, Value]:
    """What of a step went to its input, and what of it a pipeline stage did not wait for others."""
    values: dict[str, Value] = {}
    if engine.takes_images:
        values["input_share"] = input_seconds / seconds
    if mesh.pp.size > 1 and mesh.device.type == "cpu":
        waited = engine.take_seconds_waited()
        if waited is not None:
            values[f"stage{mesh.pp.rank + 1}/utilisation"] = 1 - waited / seconds
    return values
