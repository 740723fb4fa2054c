"""The grid that a layer has discovered: what the layer above is analysed on.

Shapes:

    d   units      K   kernels
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dense2conv.shapes import Geometry, ImageShape
from dense2conv.structure.lattice import Lattice, fit_lattice

MAX_SHARED = 0.1  # share of a kernel's places that its channel may already hold


@dataclass(frozen=True)
class Channel:
    """Kernels that are variants of one: alike, and with places that complete one another.

    kernels: their indices; lattice: the one they tile together; num_units: on all of them.
    """

    kernels: tuple[int, ...]
    lattice: Lattice
    num_units: int


def find_channels(
    kernels: Tensor, kernel: Tensor, y: Tensor, x: Tensor, min_correlation: float
) -> list[Channel]:
    """Join kernels into channels, the one with most units first.

    Least squares tells apart variants that a lattice mixes, e.g. a field that is a little wider
    at the edge. Two kernels are variants if they correlate (sign aside) by ``min_correlation`` and
    hardly ever share a place; different features of one map would share all of them.

    kernels: (K, C, s, s); kernel, y, x: (d,), kernel -1 for a unit on none.
    """
    flat = F.normalize(kernels.double().flatten(1))
    sizes = torch.bincount(kernel[kernel >= 0], minlength=len(kernels))
    width = int(x.max()) + 1 if len(x) else 1
    place = y * width + x
    members: list[list[int]] = []
    taken: list[Tensor] = []
    for k in sizes.argsort(descending=True, stable=True).tolist():
        mine = place[kernel == k].unique()
        for i, others in enumerate(members):
            alike = float((flat[k] @ flat[others[0]]).abs()) >= min_correlation
            shared = int(torch.isin(mine, taken[i]).sum())
            if alike and shared <= MAX_SHARED * len(mine):
                others.append(k)
                taken[i] = torch.cat([taken[i], mine])
                break
        else:
            members.append([k])
            taken.append(mine)
    channels = []
    for group in members:
        on = torch.isin(kernel, torch.tensor(group, device=kernel.device))
        channels.append(Channel(tuple(sorted(group)), fit_lattice(y[on], x[on]), int(on.sum())))
    return channels


def discovered_grid(
    channels: list[Channel],
    fields: dict[str, Tensor],
    y: Tensor,
    x: Tensor,
    split_signs: bool,
    shape: ImageShape,
) -> Geometry:
    """Every unit's channel and place, in steps of the channels' common stride.

    fields: (d,) kernel, alive, gain, centre_y, centre_x; y, x: (d,) places of units on a kernel;
    shape: grid of the layer's own inputs. Left-over units get a last channel of their own, at the
    step nearest their centre; dead units none. With ``split_signs`` units of negative gain go to
    a second set of channels.
    """
    kernel, gain, alive = fields["kernel"], fields["gain"], fields["alive"]
    on = kernel >= 0
    num_channels = len(channels)
    channel = torch.full_like(kernel, -1)
    for i, found in enumerate(channels):
        channel[torch.isin(kernel, torch.tensor(found.kernels, device=kernel.device))] = i
    if split_signs:
        channel = torch.where(on & (gain < 0), channel + num_channels, channel)
        num_channels *= 2
    left = alive & ~on
    if bool(left.any()):
        channel = torch.where(left, num_channels, channel)
        num_channels += 1

    def steps(place: Tensor, centre: Tensor, stride: int, offset: int, size: int) -> Tensor:
        last = int((place[on] - offset).max()) // stride if bool(on.any()) else size - 1
        nearest = ((centre - offset).double() / stride).round().long().clamp(0, last)
        own = torch.div(place - offset, stride, rounding_mode="floor")
        return torch.where(on, own, torch.where(left, nearest, -1))

    lattices = [found.lattice for found in channels]
    stride_y = math.gcd(*(k.stride_y for k in lattices)) or 1
    stride_x = math.gcd(*(k.stride_x for k in lattices)) or 1
    offset_y = int(y[on].min()) if bool(on.any()) else 0
    offset_x = int(x[on].min()) if bool(on.any()) else 0
    grid_y = steps(y, fields["centre_y"], stride_y, offset_y, shape.height)
    grid_x = steps(x, fields["centre_x"], stride_x, offset_x, shape.width)
    height, width = (int(v.max()) + 1 if len(v) else 1 for v in (grid_y, grid_x))
    grid = ImageShape(max(1, num_channels), max(1, height), max(1, width))
    return Geometry(grid, channel.cpu(), grid_y.cpu(), grid_x.cpu())
