"""Crops, shift-invariant correlation, placement and lattices."""

from __future__ import annotations

import pytest
import torch

from dense2conv.shapes import Geometry, ImageShape
from dense2conv.structure import Lattice, fit_lattice, receptive_fields, translation
from dense2conv.structure.grid import InputGrid, fold
from dense2conv.structure.placement import place_units, prediction_energy
from dense2conv.structure.translation import aligned_mean, correlations, crops, find_templates
from tests.structure.planted import convolution, generator, planted_layer, unroll


@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate", "circular"])
def test_fold_is_what_torch_pads(padding: str) -> None:
    size, pad = 7, 4
    line = torch.arange(1.0, size + 1)[None, None, None]  # zero stays for what is outside
    mode = "constant" if padding == "zeros" else padding
    expected = torch.nn.functional.pad(line, (pad, pad, 0, 0), mode=mode)[0, 0, 0].long() - 1
    assert torch.equal(fold(torch.arange(-pad, size + pad), size, padding), expected)


def test_crops_hold_the_surround_and_know_the_edge() -> None:
    geometry = Geometry.of_image(ImageShape(2, 5, 6))
    weight = torch.randn(3, 60, generator=generator(0), dtype=torch.float64)
    y, x = torch.tensor([0, 2, 4]), torch.tensor([0, 3, 5])
    found = crops(weight, geometry, y, x, half=1)
    images = weight.view(3, 2, 5, 6)
    torch.testing.assert_close(found.values[1], images[1, :, 1:4, 2:5])
    torch.testing.assert_close(found.values[0, :, 1:, 1:], images[0, :, :2, :2])
    assert float(found.values[0, :, 0].abs().sum()) == 0
    assert found.count.shape == (3, 2, 5, 5)
    assert found.count[0, 0].sum() == 9
    assert found.count[1, 0].sum() == 25
    torch.testing.assert_close(found.energy, weight.square().sum(1))


def test_correlation_undoes_shift_sign_and_gain_even_at_the_edge() -> None:
    weight, kernels, geometry = planted_layer(1, 3, 1, "zeros", size=9, num_dead=0)
    fields = receptive_fields(weight, geometry)
    units = crops(weight, geometry, fields.centre_y, fields.centre_x, half=3)
    template = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    template[0, 0, 2:5, 2:5] = kernels[0, 0]
    value, shift_y, shift_x = correlations(units, template)
    shown = value[:, 0].abs() > 1 - 1e-9
    assert shown.float().mean() > 0.95  # some corners show too little of the kernel to count
    peak = kernels[0, 0].abs().argmax()
    inner = units.clear
    assert torch.equal(shift_y[inner, 0], (1 - peak // 3).expand(int(inner.sum())))
    assert torch.equal(shift_x[inner, 0], (1 - peak % 3).expand(int(inner.sum())))


def test_energy_that_the_template_does_not_reach_counts_against_a_unit() -> None:
    geometry = Geometry.of_image(ImageShape(1, 12, 12))
    weight = torch.zeros(1, 144, dtype=torch.float64)
    weight[0, 65], weight[0, 11] = 2.0, 1.9
    units = crops(weight, geometry, torch.tensor([5]), torch.tensor([5]), half=2)
    template = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    template[0, 0, 2, 2] = 1
    expected = 2.0 / (2.0**2 + 1.9**2) ** 0.5
    assert float(correlations(units, template)[0]) == pytest.approx(expected)


def test_templates_need_enough_units() -> None:
    weight, _, geometry = planted_layer(2, 3, 1, "none", size=9, num_dead=2)
    fields = receptive_fields(weight, geometry)
    units = crops(weight, geometry, fields.centre_y, fields.centre_x, half=4)
    assert len(find_templates(units, 8, 0.8, 4).values) == 2
    assert len(find_templates(units, 1, 0.8, 4).values) == 1
    assert len(find_templates(units, 8, 0.8, 999).values) == 0


def _crowded_units(half: int = 2):
    """Crops of rows of all kinds of spread, on a grid whose cells hold up to three inputs."""
    g = generator(6)
    shape, cell = ImageShape(2, 7, 8), torch.randint(112, (150,), generator=g)
    geometry = Geometry(shape, cell // 56, cell % 56 // 8, cell % 8)
    weight = torch.randn(40, 150, generator=g, dtype=torch.float64)
    weight *= torch.rand(40, 1, generator=g) ** 3 > torch.rand(40, 150, generator=g)
    fields = receptive_fields(weight, geometry)
    return crops(weight, geometry, fields.centre_y, fields.centre_x, half)


def test_no_correlation_exceeds_its_bound() -> None:
    units = _crowded_units()
    bound = translation._largest_correlation(units)
    templates = torch.cat([units.values, torch.randn(60, 2, 5, 5, generator=generator(8)).double()])
    found = correlations(units, templates)[0].abs().amax(1)
    assert bool((found <= bound).all())
    assert float((found / bound).amax()) > 0.8  # and it is no idle one


@pytest.mark.parametrize("min_correlation", [0.5, 0.8, 0.999])
def test_units_that_cannot_match_are_left_out_without_a_difference(
    min_correlation, monkeypatch
) -> None:
    weight, _, geometry = planted_layer(3, 3, 1, "zeros", size=9)
    noise = torch.randn(weight.shape, generator=generator(9), dtype=torch.float64)
    weight[::3] += 0.3 * noise[::3]  # a third of the units is spread all over the image
    fields = receptive_fields(weight, geometry)
    units = crops(weight, geometry, fields.centre_y, fields.centre_x, half=2)
    quick = find_templates(units, 8, min_correlation, 4)
    monkeypatch.setattr(
        translation, "_largest_correlation", lambda units: torch.ones_like(units.energy)
    )
    slow = find_templates(units, 8, min_correlation, 4)
    assert len(quick.values) > 0
    torch.testing.assert_close(quick.values, slow.values)
    assert torch.equal(quick.num_units, slow.num_units)


def test_aligned_mean_is_least_squares_whatever_the_pieces(monkeypatch) -> None:
    units = _crowded_units()
    members = torch.tensor([0, 3, 4, 11, 30])
    g = generator(10)
    correlation = torch.rand(40, generator=g, dtype=torch.float64) - 0.5
    y, x = torch.randint(-2, 3, (2, 40), generator=g)
    monkeypatch.setattr("dense2conv.structure.locality.CHUNK_NUMBERS", 400)
    template, _ = aligned_mean(units, members, correlation, y, x)
    product, norm = torch.zeros(2, 2, 5, 5, dtype=torch.float64)
    for i in members.tolist():
        gain = correlation[i] * units.energy[i].sqrt()
        for a in range(5):
            for b in range(5):
                row, column = a + int(y[i]), b + int(x[i])
                norm[:, a, b] += gain**2 * units.count[i, :, row + 2, column + 2]
                if 0 <= row < 5 and 0 <= column < 5:
                    product[:, a, b] += gain * units.values[i, :, row, column]
    torch.testing.assert_close(template, product / norm.clamp_min(1e-300))


@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate", "circular"])
def test_prediction_energy_and_placement_against_dense_rows(padding: str) -> None:
    shape = ImageShape(2, 6, 7)
    geometry = Geometry.of_image(shape)
    kernels = torch.randn(3, 2, 3, 3, generator=generator(4), dtype=torch.float64)
    rows = unroll(convolution(kernels, shape, 1, padding), shape.numel)  # (3·H·W, D)
    grid = InputGrid(geometry)
    energy = prediction_energy(kernels, grid, padding)
    torch.testing.assert_close(energy.flatten(), rows.square().sum(1))
    fields = receptive_fields(rows, geometry)
    found = place_units(-2 * rows, grid, fields.centre_y, fields.centre_x, kernels, padding)
    index = (found.kernel * 6 + found.y) * 7 + found.x
    assert torch.equal(index, torch.arange(len(rows)))
    torch.testing.assert_close(found.gain, torch.full_like(found.gain, -2))
    torch.testing.assert_close(found.correlation, torch.ones_like(found.gain))


LATTICES = [
    (range(0, 9), range(0, 9), (1, 1, 0, 0)),
    (range(1, 12, 2), range(2, 12, 3), (2, 3, 1, 2)),
    (range(0, 1), range(3, 20, 4), (1, 4, 0, 3)),
    (range(5, 6), range(7, 8), (1, 1, 5, 7)),
]


@pytest.mark.parametrize(("rows", "columns", "expected"), LATTICES)
def test_lattice(rows: range, columns: range, expected: tuple[int, ...]) -> None:
    y, x = (
        v.flatten()
        for v in torch.meshgrid(torch.tensor(rows), torch.tensor(columns), indexing="ij")
    )
    found = fit_lattice(y, x)
    assert found == Lattice(*expected, 1.0)
    assert bool(found.holds(y, x).all())


def test_lattice_ignores_a_few_that_are_off_it_and_counts_holes() -> None:
    y, x = (
        v.flatten()
        for v in torch.meshgrid(torch.arange(0, 20, 2), torch.arange(0, 20, 2), indexing="ij")
    )
    keep = torch.arange(100) % 10 != 5
    y, x = torch.cat([y[keep], torch.tensor([3])]), torch.cat([x[keep], torch.tensor([4])])
    found = fit_lattice(y, x)
    assert (found.stride_y, found.stride_x) == (2, 2)
    assert found.coverage == pytest.approx(0.9)
    assert found.holds(y, x).tolist() == [True] * 90 + [False]
