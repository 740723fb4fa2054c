"""The best kernel and place of every unit, given the padding: matched on the unit's own weights.

Shapes:

    n   units      K   kernels      C   channels      s   side of a kernel      H, W   grid
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dense2conv.structure.grid import InputGrid
from dense2conv.structure.locality import row_chunks

MIN_SHOWN = 0.01  # share of a kernel's energy that a place must show


@dataclass
class Placement:
    """(n,) each: kernel and place of its centre, and how well the unit's weights agree.

    gain is the least-squares one, <w, prediction> / |prediction|²; correlation is
    |<w, prediction>| / (|w| |prediction|), 0 for dead units.
    """

    kernel: Tensor
    y: Tensor
    x: Tensor
    gain: Tensor
    correlation: Tensor


def prediction_energy(kernels: Tensor, grid: InputGrid, padding: str) -> Tensor:
    """Squared norm of the dense row that each kernel makes at each place: (K, H, W).

    Taps that padding folds onto one pixel are added before they are squared, and every input of a
    cell counts. kernels: (K, C, s, s).
    """
    half = kernels.shape[-1] // 2
    energy = F.conv2d(grid.count[None], kernels.square(), padding=half)[0]  # (K, H, W)
    y, x = torch.meshgrid(
        torch.arange(grid.height, device=kernels.device),
        torch.arange(grid.width, device=kernels.device),
        indexing="ij",
    )
    y, x = y.flatten(), x.flatten()
    edge = (~grid.inside(y, x, half)).nonzero()[:, 0]
    num_taps = kernels[0, 0].numel() if len(kernels) else 1
    for rows in row_chunks(len(edge), num_taps * max(num_taps, kernels[:, :, 0, 0].numel())):
        some = edge[rows]
        taps = grid.window(y[some], x[some], half, padding)  # (P, s²)
        same = (taps[:, :, None] == taps[:, None, :]) & (taps >= 0)[:, :, None]  # (P, s², s²)
        count = grid.gather(grid.count, taps)  # (P, C, s²)
        flat = kernels.flatten(2)  # (K, C, s²)
        folded = torch.einsum("ptu,kcu->pkct", same.double(), flat)
        energy[:, y[some], x[some]] = torch.einsum("pkct,kct,pct->kp", folded, flat, count)
    return energy


def place_units(
    weight: Tensor,
    grid: InputGrid,
    centre_y: Tensor,
    centre_x: Tensor,
    kernels: Tensor,
    padding: str,
) -> Placement:
    """Match every row to each kernel at each place around its centre, and keep the best.

    A kernel's window always holds the unit's largest weight, so places lie within s // 2 of it,
    and inside the image; with circular padding, maybe on its other side. weight: (n, D),
    kernels: (K, C, s, s) with K ≥ 1.
    """
    side = kernels.shape[-1]
    half = side // 2
    energy = prediction_energy(kernels, grid, padding)  # (K, H, W)
    total = kernels.square().sum((1, 2, 3)).view(1, -1, 1)
    steps = torch.arange(-half, half + 1, device=weight.device)
    distance = (steps[:, None].square() + steps.square()).flatten().double()  # (s²,)
    parts: list[tuple[Tensor, ...]] = []
    for rows in row_chunks(len(weight), max(weight.shape[1], grid.num_cells)):
        image = grid.scatter(weight[rows].double())  # (n, C, H, W)
        y, x = centre_y[rows], centre_x[rows]
        wide = grid.window(y, x, 2 * half, padding)  # (n, (4·half + 1)²)
        around = grid.gather_own(image, wide).unflatten(2, (4 * half + 1, 4 * half + 1))
        product = F.conv2d(around, kernels).flatten(2)  # (n, K, s²)
        # Where the image wraps around, so do places; otherwise a place outside it is -1.
        places = grid.window(y, x, half, padding if padding == "circular" else "zeros")  # (n, s²)
        shown = energy.flatten(1)[:, places.clamp_min(0)].transpose(0, 1)  # (n, K, s²)
        possible = (places >= 0)[:, None] & (shown >= MIN_SHOWN * total)
        norm = weight[rows].double().square().sum(1).view(-1, 1, 1)  # (n, 1, 1)
        value = product.abs() / (norm * shown).clamp_min(1e-300).sqrt() * possible
        # Nearest place, then first kernel, of what agrees equally well whatever the rounding.
        score = (value - 1e-7 * distance).round(decimals=9)
        best = score.flatten(1).argmax(1)  # (n,)

        def of(values: Tensor, best: Tensor = best) -> Tensor:
            return values.flatten(1).gather(1, best[:, None])[:, 0]

        place = places.gather(1, best[:, None] % distance.numel())[:, 0].clamp_min(0)
        gain = of(product) / of(shown).clamp_min(1e-300)
        parts.append(
            (
                torch.div(best, distance.numel(), rounding_mode="floor"),
                torch.div(place, grid.width, rounding_mode="floor"),
                place % grid.width,
                torch.where(of(value) > 0, gain, 0.0),
                of(value),
            )
        )
    if not parts:
        none = centre_y.new_zeros(0)
        return Placement(none, none, none, none.double(), none.double())
    return Placement(*(torch.cat(column) for column in zip(*parts, strict=True)))


def agreement(
    weight: Tensor, grid: InputGrid, placement: Placement, kernels: Tensor, padding: str
) -> Tensor:
    """(n,) |<w, prediction>| / (|w| |prediction|) of every row with its kernel at its place."""
    half = kernels.shape[-1] // 2
    energy = prediction_energy(kernels, grid, padding)  # (K, H, W)
    taps = grid.window(placement.y, placement.x, half, padding)
    parts = []
    for rows in row_chunks(len(weight), max(weight.shape[1], grid.num_cells)):
        seen = grid.gather_own(grid.scatter(weight[rows].double()), taps[rows])  # (n, C, s²)
        product = (seen * kernels[placement.kernel[rows]].flatten(2)).sum((1, 2))
        shown = energy[placement.kernel[rows], placement.y[rows], placement.x[rows]]
        norm = weight[rows].double().square().sum(1) * shown
        parts.append(product.abs() / norm.clamp_min(1e-300).sqrt())
    return torch.cat(parts) if parts else kernels.new_zeros(0)
