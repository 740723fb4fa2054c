"""Every statistic against a slow, obvious version."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dense2conv.shapes import Geometry, ImageShape, InputError
from dense2conv.structure import random_radius, receptive_fields, shuffled
from tests.structure.planted import generator


def slow_statistics(row: Tensor, geometry: Geometry, window: int) -> dict[str, float]:
    """One unit, one place at a time."""
    height, width = geometry.shape.height, geometry.shape.width
    energy = [[0.0] * width for _ in range(height)]
    best, centre, fourth = 0.0, (0, 0), 0.0
    for j, w in enumerate(row.tolist()):
        if int(geometry.channel[j]) < 0:
            continue
        y, x = int(geometry.y[j]), int(geometry.x[j])
        energy[y][x] += w * w
        fourth += w**4
        if abs(w) > best:
            best, centre = abs(w), (y, x)
    total = sum(map(sum, energy))
    names = ("centre_y", "centre_x", "radius", "participation", "entropy", "window_mass")
    if total == 0:
        return dict.fromkeys(names, 0.0) | {"alive": 0.0}
    p = {(y, x): energy[y][x] / total for y in range(height) for x in range(width)}
    mean_y = sum(y * v for (y, _), v in p.items())
    mean_x = sum(x * v for (_, x), v in p.items())
    spread = sum(((y - mean_y) ** 2 + (x - mean_x) ** 2) * v for (y, x), v in p.items())
    wy, wx = min(window, height), min(window, width)
    masses = [
        sum(p[y + i, x + j] for i in range(wy) for j in range(wx))
        for y in range(height - wy + 1)
        for x in range(width - wx + 1)
    ]
    values = (
        *centre, math.sqrt(spread), total**2 / fourth,
        -sum(v * math.log(v) for v in p.values() if v > 0), max(masses),
    )  # fmt: skip
    return dict(zip(names, map(float, values), strict=True)) | {"alive": 1.0}


def scattered_geometry() -> Geometry:
    """Two channels, shared and empty places, inputs without a place, in no order."""
    g = generator(0)
    channel = torch.randint(-1, 2, (40,), generator=g)
    y, x = (torch.randint(n, (40,), generator=g) for n in (5, 7))
    return Geometry(ImageShape(2, 5, 7), channel, y, x)


@pytest.mark.parametrize("window", [1, 3, 6])
@pytest.mark.parametrize(
    "geometry",
    [Geometry.of_image(ImageShape(1, 6, 8)), Geometry.of_image(ImageShape(3, 4, 4)), None],
    ids=["grey", "colour", "scattered"],
)
def test_statistics_equal_the_slow_ones(geometry: Geometry | None, window: int) -> None:
    geometry = geometry or scattered_geometry()
    weight = torch.randn(9, len(geometry), generator=generator(1)).double()
    weight *= torch.rand(weight.shape, generator=generator(2)) < 0.2
    weight[4] = 0
    weight[5] *= 1e-200  # squares underflow
    found = receptive_fields(weight, geometry, window)
    for i, row in enumerate(weight):
        scaled = row / row.abs().max().clamp_min(1e-300)
        for name, value in slow_statistics(scaled, geometry, window).items():
            assert float(getattr(found, name)[i]) == pytest.approx(value, abs=1e-12), name


def test_one_pixel_and_flat_fields() -> None:
    geometry = Geometry.of_image(ImageShape(1, 8, 8))
    weight = torch.zeros(2, 64)
    weight[0, 19] = -3.0
    weight[1] = 1.0
    found = receptive_fields(weight, geometry)
    assert (int(found.centre_y[0]), int(found.centre_x[0])) == (2, 3)
    assert found.radius.tolist() == pytest.approx([0, random_radius(geometry)])
    assert found.participation.tolist() == pytest.approx([1, 64])
    assert found.entropy.tolist() == pytest.approx([0, math.log(64)])
    assert found.window_mass.tolist() == pytest.approx([1, 25 / 64])


def test_unplaced_inputs_are_ignored() -> None:
    geometry = Geometry(
        ImageShape(1, 2, 2),
        torch.tensor([0, -1, 0]),
        torch.tensor([0, -1, 1]),
        torch.zeros(3).long(),
    )
    found = receptive_fields(torch.tensor([[1.0, 9.0, 0.5], [0.0, 9.0, 0.0]]), geometry)
    assert found.alive.tolist() == [True, False]
    assert found.centre_y.tolist() == [0, 0]
    assert all(bool(torch.isfinite(v).all()) for v in found.as_dict().values())


def test_random_radius() -> None:
    side = 30
    value = random_radius(Geometry.of_image(ImageShape(3, side, side)))
    assert value == pytest.approx(side / math.sqrt(6), rel=1e-2)
    geometry = Geometry.of_image(ImageShape(1, 9, 12))
    rows = torch.randn(4000, len(geometry), generator=generator(3))
    measured = receptive_fields(rows, geometry).radius.square().mean().sqrt()
    assert random_radius(geometry) == pytest.approx(float(measured), rel=2e-2)
    nowhere = Geometry(ImageShape(1, 2, 2), *(-torch.ones(3).long() for _ in range(3)))
    assert random_radius(nowhere) == 0


def test_shuffled_permutes_each_row_on_its_own() -> None:
    weight = torch.arange(60.0).view(3, 20)
    mixed = shuffled(weight, generator(0))
    assert torch.equal(mixed.sort(dim=1).values, weight)
    orders = (mixed - weight[:, :1]).long().tolist()
    assert len({tuple(order) for order in orders}) == 3
    assert torch.equal(mixed, shuffled(weight, generator(0)))


def test_no_rows_and_wrong_shapes() -> None:
    geometry = Geometry.of_image(ImageShape(1, 3, 3))
    assert all(
        len(v) == 0 for v in receptive_fields(torch.zeros(0, 9), geometry).as_dict().values()
    )
    with pytest.raises(InputError, match="places 9 inputs"):
        receptive_fields(torch.zeros(2, 8), geometry)
    with pytest.raises(InputError, match="window = 0"):
        receptive_fields(torch.zeros(2, 9), geometry, window=0)
