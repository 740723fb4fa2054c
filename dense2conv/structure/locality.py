"""How local every unit of a dense layer is: centre, radius and spread of its receptive field.

Nothing here compares units, so each process measures the rows it holds.

    n   units held here      D   inputs      H, W   grid of the inputs
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from dense2conv.shapes import Geometry, InputError

CHUNK_NUMBERS = 1 << 18  # numbers in one temporary: 2 MiB in float64, which a core's cache holds


@dataclass
class ReceptiveFields:
    """One (n,) tensor per statistic; dead units (zero rows) have 0 everywhere.

    alive           bool, the row has a non-zero weight on a placed input
    centre_y/x      int64, place of the largest |w| over all channels (the first one on ties)
    radius          sqrt(sum_p p |x - mean|²), p = w²/sum w² with channels summed, in pixels
    participation   (sum w²)² / sum w⁴, the participation ratio *of energies* over weights: the
                    effective number of inputs; one pixel gives 1, a flat grey field H·W
    entropy         -sum p log p over places, in nats; one pixel gives 0
    window_mass     share of the energy inside the best ``window × window`` square
    """

    alive: Tensor
    centre_y: Tensor
    centre_x: Tensor
    radius: Tensor
    participation: Tensor
    entropy: Tensor
    window_mass: Tensor

    def as_dict(self) -> dict[str, Tensor]:
        """The statistics by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def check_weight(weight: Tensor, geometry: Geometry) -> None:
    """Raise InputError unless ``weight`` is (n, D) with D the inputs of ``geometry``."""
    if weight.ndim != 2 or weight.shape[1] != len(geometry):
        raise InputError(
            f"weight is {tuple(weight.shape)}, but its geometry places {len(geometry)} inputs; "
            "pass rows of the layer that reads these inputs"
        )


def row_chunks(num_rows: int, row_length: int) -> list[slice]:
    """Slices of rows whose temporaries stay under CHUNK_NUMBERS numbers."""
    size = max(1, CHUNK_NUMBERS // max(1, row_length))
    return [slice(i, min(i + size, num_rows)) for i in range(0, num_rows, size)]


def place_of_input(geometry: Geometry) -> Tensor:
    """(D,) int64: y·W + x of every input, and H·W for an input that has no place."""
    width, nowhere = geometry.shape.width, geometry.shape.height * geometry.shape.width
    place = geometry.y * width + geometry.x
    return torch.where(geometry.placed, place, torch.full_like(place, nowhere))


def receptive_fields(weight: Tensor, geometry: Geometry, window: int = 5) -> ReceptiveFields:
    """Measure the receptive field of every row, as :class:`ReceptiveFields` defines it.

    weight: (n, D), any float type and device; geometry: places of the D inputs; window: side of
    the square of ``window_mass`` (clipped to the grid). Inputs without a place are ignored.
    Statistics are float64. Raises InputError if shapes differ or ``window`` is not positive.
    """
    check_weight(weight, geometry)
    if window < 1:
        raise InputError(f"window = {window} is not a side in pixels; use 1 or more")
    device = weight.device
    place = place_of_input(geometry).to(device)
    # Made beforehand: small results between large temporaries would keep these from the system.
    columns = [c.new_empty(len(weight)) for c in _chunk_fields(weight[:0], geometry, place, window)]
    for rows in row_chunks(len(weight), weight.shape[1]):
        parts = _chunk_fields(weight[rows], geometry, place, window)
        for column, part in zip(columns, parts, strict=True):
            column[rows] = part
    return ReceptiveFields(*columns)


def _chunk_fields(
    weight: Tensor, geometry: Geometry, place: Tensor, window: int
) -> tuple[Tensor, ...]:
    height, width = geometry.shape.height, geometry.shape.width
    num_places, n = height * width, len(weight)
    magnitude = weight.double().abs() * (place < num_places)  # (n, D)
    alive = (magnitude > 0).any(dim=1)  # (n,)
    # Squares of tiny weights underflow; a row is only judged up to its scale.
    magnitude = magnitude / magnitude.amax(1, keepdim=True).clamp_min(
        torch.finfo(torch.float64).tiny
    )
    if magnitude.shape[1]:
        peak = place[magnitude.argmax(dim=1)].clamp_max(num_places - 1) * alive
    else:
        peak = torch.zeros(n, dtype=torch.int64, device=weight.device)

    energy = torch.zeros(n, num_places + 1, dtype=torch.float64, device=weight.device)
    energy = energy.index_add_(1, place, magnitude.square())[:, :num_places]  # (n, H·W)
    share = energy / energy.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)

    by_y = share.view(n, height, width).sum(2)  # (n, H)
    by_x = share.view(n, height, width).sum(1)  # (n, W)
    variance = _variance(by_y) + _variance(by_x)
    own = magnitude.square()
    own = own / own.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    squares = own.square().sum(1)
    window_y, window_x = min(window, height), min(window, width)
    boxes = F.avg_pool2d(share.view(n, 1, height, width), (window_y, window_x), stride=1)
    return (
        alive,
        peak // width,
        peak % width,
        variance.sqrt(),
        torch.where(alive, 1 / squares.clamp_min(1e-300), squares),
        -torch.special.xlogy(share, share).sum(1) + 0.0,
        boxes.flatten(1).amax(1) * (window_y * window_x),
    )


def _variance(share: Tensor) -> Tensor:
    """(n, L) distribution over 0…L-1 → (n,) variance, from centred coordinates."""
    position = torch.arange(share.shape[1], dtype=torch.float64, device=share.device)
    mean = (share * position).sum(1, keepdim=True)  # (n, 1)
    return (share * (position - mean).square()).sum(1)


def random_radius(geometry: Geometry) -> float:
    """Radius of a dense Gaussian row's expected energy: uniform over the placed inputs.

    About side/√6 on a square image. 0 where no input has a place.
    """
    placed = geometry.coordinates[geometry.placed]  # (placed, 2)
    if not len(placed):
        return 0.0
    return math.sqrt(float((placed - placed.mean(0)).square().sum(1).mean()))


def shuffled(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Null model: the weights of each row permuted over the inputs, each row on its own.

    weight: (n, D) → (n, D), same values a row. Keeps every row's sparsity and magnitudes and
    destroys only where they are. The generator must live on the weight's device.
    """
    result = torch.empty_like(weight)
    for rows in row_chunks(*weight.shape):
        noise = torch.rand(weight[rows].shape, generator=generator, device=weight.device)
        result[rows] = weight[rows].gather(1, noise.argsort(dim=1))
    return result
