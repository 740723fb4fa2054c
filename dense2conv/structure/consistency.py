"""Whether the parts of an extracted layer fit together: what a damaged file would break."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dense2conv.structure.grid import PADDINGS

if TYPE_CHECKING:
    from dense2conv.structure.emission import ExtractedLayer


def contradictions(
    layer: ExtractedLayer, kernels: Tensor, gain: Tensor, left_value: Tensor, bias: Tensor | None
) -> list[str]:
    """The rules that a layer under construction breaks, in words; none if it is sound."""
    broken = _shapes(layer, kernels, gain, bias)
    # Values are only worth a look, and safe to use as indices, once shapes are right.
    return broken or [*_places(layer), *_left_over(layer, left_value)]


def _broken(rules: dict[str, bool]) -> list[str]:
    return [rule for rule, kept in rules.items() if not kept]


def _shapes(layer: ExtractedLayer, kernels: Tensor, gain: Tensor, bias: Tensor | None) -> list[str]:
    d, side, num_kernels = layer.num_units, layer.side, len(layer.lattices)
    half, smallest = side // 2, min(layer.shape.height, layer.shape.width)
    too_wide = (layer.padding == "reflect" and half >= smallest) or (
        layer.padding == "circular" and half > smallest
    )
    expected = (num_kernels, layer.shape.channels, side, side)
    return _broken(
        {
            f"kernels are {tuple(kernels.shape)}, not {expected} with an odd side": (
                kernels.shape == expected and side % 2 == 1
            ),
            f"padding = {layer.padding!r} is unknown": layer.padding in PADDINGS,
            f"{layer.padding} padding by {half} needs more than {smallest} places": not too_wide,
            f"kernel, y, x, gain and bias must be ({d},)": all(
                tensor.shape == (d,)
                for tensor in (layer.kernel, layer.y, layer.x, gain, bias)
                if tensor is not None
            ),
            f"a unit's kernel is not one of {num_kernels}": d == 0
            or int(layer.kernel.max()) < num_kernels,
        }
    )


def _places(layer: ExtractedLayer) -> list[str]:
    on = layer.kernel >= 0
    y, x = layer.y[on], layer.x[on]
    margin = layer.side // 2 if layer.padding == "none" else 0
    inside = (y >= margin) & (y < layer.shape.height - margin)
    inside &= (x >= margin) & (x < layer.shape.width - margin)
    rows = [[k.stride_y, k.stride_x, k.offset_y, k.offset_x] for k in layer.lattices]
    lattice = torch.tensor(rows, dtype=torch.int64, device=y.device).view(-1, 4)[layer.kernel[on]]
    step_y, step_x = y - lattice[:, 2], x - lattice[:, 3]
    on_lattice = (step_y % lattice[:, 0] == 0) & (step_x % lattice[:, 1] == 0)
    on_lattice &= (step_y >= 0) & (step_x >= 0)
    return _broken(
        {
            "a unit's place, or with padding none its window, leaves the grid": bool(inside.all()),
            "a unit's place is not on its kernel's lattice": bool(on_lattice.all()),
        }
    )


def _left_over(layer: ExtractedLayer, left_value: Tensor) -> list[str]:
    unit, index = layer.left_unit, layer.left_input
    if not unit.shape == index.shape == left_value.shape == (len(unit),):
        return ["left-over weights need one unit, input and value each"]
    in_range = (unit >= 0) & (unit < layer.num_units) & (index >= 0) & (index < layer.num_inputs)
    if not bool(in_range.all()):
        return ["a left-over weight's unit or input does not exist"]
    return _broken(
        {
            "left-over weights are not sorted by unit": bool((unit[1:] >= unit[:-1]).all()),
            "a left-over unit is also on a kernel": not bool(
                (layer.kernel[unit.unique_consecutive()] >= 0).any()
            ),
        }
    )
