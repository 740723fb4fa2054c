"""Least squares on outputs: kernels that are there, that are not, and that are missing."""

from __future__ import annotations

import torch
from torch import Tensor

from dense2conv.shapes import Axis, Geometry
from dense2conv.structure import ExtractConfig
from dense2conv.structure.fitting import Moments, Targets, evaluate, grow, refine
from dense2conv.structure.grid import InputGrid
from tests.structure.planted import generator, planted_layer, same_up_to_gain, smooth_images


def problem() -> tuple[Tensor, Tensor, Geometry, Tensor, Tensor, Tensor, Targets, Moments]:
    """Two planted 3×3 kernels with zero padding, places known."""
    weight, kernels, geometry = planted_layer(2, 3, 1, "zeros", size=8, num_dead=0)
    grid = InputGrid(geometry)
    inputs = smooth_images(200, geometry)
    targets = Targets.of(weight, inputs, grid)
    rows = weight.view(-1, 8, 9)
    # Every unit's place: the only window that holds all its weights, by brute force.
    y = torch.empty(len(weight), dtype=torch.int64)
    x = torch.empty_like(y)
    for i, row in enumerate(rows):
        used = row.nonzero()
        low, high = used.min(0).values, used.max(0).values
        y[i] = low[0] + 1 if low[0] > 0 else high[0] - 1
        x[i] = low[1] + 1 if low[1] > 0 else high[1] - 1
    units = torch.arange(len(weight))
    moments = Moments.of(targets, units, grid, y, x, 1, "zeros")
    return weight, kernels, geometry, y, x, inputs, targets, moments


def test_moments_and_streamed_evaluation_agree_with_lstsq() -> None:
    weight, _, geometry, y, x, inputs, targets, moments = problem()
    units = torch.tensor([3, 50, 90])
    trial = torch.randn(4, 1, 3, 3, generator=generator(5), dtype=torch.float64)
    streamed = evaluate(targets, units, InputGrid(geometry), y[units], x[units], trial, "zeros")
    held = moments.fit(trial.flatten(1))
    torch.testing.assert_close(streamed.explained, held.explained[units])
    torch.testing.assert_close(streamed.gain, held.gain[units])
    padded = torch.nn.functional.pad(inputs.view(-1, 1, 8, 9), (1,) * 4)
    u = 50
    patch = padded[:, 0, y[u] : y[u] + 3, x[u] : x[u] + 3].flatten(1)
    z = inputs @ weight[u]
    response = patch @ trial[2].flatten()
    gain = torch.linalg.lstsq(response[:, None], z[:, None]).solution[0, 0]
    explained = 1 - (z - gain * response).square().sum() / z.square().sum()
    torch.testing.assert_close(held.gain[u, 2], gain)
    torch.testing.assert_close(held.explained[u, 2], explained)


def test_refine_finds_kernels_from_a_poor_start() -> None:
    _, kernels, _, _, _, _, _, moments = problem()
    start = kernels + 0.5 * torch.randn(kernels.shape, generator=generator(6)).double()
    found, explained, label = refine(moments, start.flatten(1), None, 0.5, Axis())
    assert same_up_to_gain(found, kernels)
    assert float(explained.min()) > 1 - 1e-10
    assert torch.bincount(label).tolist() == [72, 72]
    assert bool((found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all())


def grown(moments: Moments, start: Tensor) -> Tensor:
    units = torch.arange(len(moments.power))
    weights = torch.full((len(units),), 9)
    return grow(moments, start, units, weights, len(units), ExtractConfig(), Axis())[0]


def test_grow_adds_what_is_missing_and_drops_what_is_idle() -> None:
    _, kernels, _, _, _, _, _, moments = problem()
    flat = kernels.flatten(1)
    assert same_up_to_gain(grown(moments, flat[:1]), kernels)
    idle = torch.zeros(3, 9, dtype=torch.float64)
    idle[:, [0, 4, 8]] = torch.eye(3, dtype=torch.float64) * 1e-3
    noisy = flat[0] + 0.01 * torch.randn(3, 9, generator=generator(7)).double()
    assert same_up_to_gain(grown(moments, torch.cat([idle, flat, noisy])), kernels)


def test_images_whose_samples_lie_together_are_not_copied() -> None:
    weight, _, geometry = planted_layer(2, 3, 1, "zeros", size=8, num_dead=0)
    inputs = smooth_images(50, geometry)
    together = inputs.T.contiguous().T  # the same (m, D), another order in memory
    ours, copied = (Targets.of(weight, x, InputGrid(geometry)) for x in (together, inputs))
    assert ours.cells.data_ptr() == together.data_ptr()
    assert torch.equal(ours.cells, copied.cells)
    torch.testing.assert_close(ours.z, weight @ inputs.T)
    torch.testing.assert_close(ours.power, ours.z.square().mean(1))
    torch.testing.assert_close(ours.variance, ours.z.var(1, correction=0))
