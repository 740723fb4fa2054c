"""A planted convolution, unrolled and permuted, comes back exactly."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from dense2conv.shapes import Axis, Geometry, ImageShape, InputError
from dense2conv.structure import ExtractConfig, extract_layer, extraction
from tests.structure.planted import (
    convolution,
    extract,
    generator,
    planted_layer,
    same_up_to_gain,
    smooth_images,
    unroll,
)

CASES = [
    # kernels, side, stride, padding, channels, size
    (2, 3, 1, "none", 1, 10),
    (3, 3, 1, "zeros", 1, 12),
    (4, 3, 2, "zeros", 1, 15),
    (2, 3, 1, "reflect", 1, 12),
    (3, 3, 2, "reflect", 3, 13),
    (2, 3, 1, "replicate", 1, 12),
    (2, 5, 1, "none", 1, 12),
    (3, 5, 1, "zeros", 3, 12),
    (2, 5, 1, "reflect", 1, 14),
    (3, 5, 2, "none", 1, 17),
    (4, 5, 2, "zeros", 1, 20),
    (2, 5, 2, "reflect", 3, 16),
    (2, 3, 1, "circular", 1, 12),
]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("num_kernels", "side", "stride", "padding", "channels", "size"), CASES)
def test_planted_convolution(
    num_kernels: int, side: int, stride: int, padding: str, channels: int, size: int, seed: int
) -> None:
    weight, kernels, geometry = planted_layer(
        num_kernels, side, stride, padding, channels, size, seed=seed
    )
    inputs = smooth_images(600, geometry)
    found = extract(weight, geometry, inputs)
    assert found.layer.num_kernels == num_kernels
    assert found.padding == padding
    assert same_up_to_gain(found.layer.kernel_bank(), kernels)
    assert all(k["stride"] == [stride, stride] for k in found.lattices)
    first = side // 2 if padding == "none" else 0
    assert all(k["offset"] == [first, first] for k in found.lattices)
    assert all(k["coverage"] == 1 for k in found.lattices)
    assert len(found.layer.left_units) == 0
    assert torch.equal(found.fields["kernel"] < 0, ~found.fields["alive"])
    z = inputs @ weight.T
    torch.testing.assert_close(found.layer(inputs), z, rtol=1e-6, atol=1e-6 * float(z.abs().max()))
    units = torch.arange(len(weight))
    torch.testing.assert_close(found.layer.unrolled_rows(units), weight, rtol=0, atol=1e-7)
    assert float(found.fields["r2"][found.fields["alive"]].min()) > 1 - 1e-9
    # The grid of the next layer: one cell a unit, no stride left.
    grid = found.geometry
    assert (grid.shape.channels, len(grid)) == (num_kernels, len(weight))
    alive = found.fields["alive"]
    cells = torch.stack([grid.channel, grid.y, grid.x])[:, alive]
    assert len(cells.unique(dim=1).T) == int(alive.sum()) == grid.shape.numel


def test_units_of_no_kernel_are_left_over_as_sparse_rows() -> None:
    weight, kernels, geometry = planted_layer(2, 3, 1, "zeros", size=12)
    odd = torch.zeros(3, len(geometry), dtype=torch.float64)
    odd[0, ::31], odd[1, 5:90:17], odd[2, 100:150:7] = 1.0, -2.0, 0.5
    weight = torch.cat([weight[:40], odd, weight[40:]])
    bias = torch.randn(len(weight), generator=generator(3), dtype=torch.float64)
    inputs = torch.randn(400, len(geometry), generator=generator(4), dtype=torch.float64)
    found = extract(weight, geometry, inputs, bias)
    assert found.layer.left_units.tolist() == [40, 41, 42]
    assert same_up_to_gain(found.layer.kernel_bank(), kernels)
    torch.testing.assert_close(found.layer(inputs), inputs @ weight.T + bias)
    gains = int((found.fields["kernel"] >= 0).sum())
    non_zeros = int((odd != 0).sum())
    assert found.layer.num_weights == 2 * 9 + gains + non_zeros + len(weight)
    # They have a channel of their own on the next grid, near their centre.
    assert found.geometry.channel[40:43].tolist() == [2, 2, 2]
    assert int(found.geometry.y[42]) == int(found.fields["centre_y"][42])


def test_split_signs_gives_each_sign_a_channel() -> None:
    weight, _, geometry = planted_layer(2, 3, 1, "zeros", size=10)
    found = extract(weight, geometry, smooth_images(300, geometry), split_signs=True)
    on = found.fields["kernel"] >= 0
    expected = found.fields["kernel"] + 2 * (found.fields["gain"] < 0)
    assert found.geometry.shape.channels == 4
    assert torch.equal(found.geometry.channel[on], expected[on])


def test_second_layer_on_the_discovered_grid() -> None:
    """Layer 2 reads permuted units of layer 1, on two kernels with stride 2, some missing."""
    g = generator(7)
    first, _, geometry = planted_layer(2, 3, 2, "zeros", size=24, num_dead=2, seed=5)
    lower = extract(first, geometry, smooth_images(300, geometry))
    grid = lower.geometry
    assert grid.shape.channels == 2
    kernels = torch.randn(2, 2, 3, 3, generator=g, dtype=torch.float64)
    upper = unroll(convolution(kernels, grid.shape, 1, "zeros"), grid.shape.numel)
    # From cells to units; three living units are taken away: their places become empty.
    gone = lower.fields["alive"].nonzero()[:, 0][[10, 50, 90]]
    channel = grid.channel.clone()
    channel[gone] = -1
    holed = Geometry(grid.shape, channel, grid.y, grid.x)
    cell = (channel * grid.shape.height + grid.y) * grid.shape.width + grid.x
    weight = upper[:, cell.clamp_min(0)] * (channel >= 0)
    inputs = torch.randn(700, len(grid), generator=g, dtype=torch.float64)
    found = extract(weight, holed, inputs)
    assert (found.layer.num_kernels, found.padding) == (2, "zeros")
    assert same_up_to_gain(found.layer.kernel_bank(), kernels)
    assert len(found.layer.left_units) == 0
    torch.testing.assert_close(found.layer(inputs), inputs @ weight.T, rtol=1e-6, atol=1e-6)
    identity = torch.eye(len(grid), dtype=torch.float64)
    units = torch.arange(len(weight))
    torch.testing.assert_close(found.layer.unrolled_rows(units), found.layer(identity).T)
    torch.testing.assert_close(found.layer.unrolled_l1(), weight.abs().sum())


def test_one_pixel_units_are_one_1x1_kernel() -> None:
    geometry = Geometry.of_image(ImageShape(1, 9, 9))
    order = torch.randperm(81, generator=generator(2))
    weight = torch.eye(81, dtype=torch.float64)[order] * 0.7
    weight[::2] *= -1
    found = extract(weight, geometry, torch.randn(200, 81, generator=generator(0)).double())
    assert found.layer.kernel_bank().shape == (1, 1, 1, 1)
    assert found.padding == "none"
    assert found.lattices == [
        {"stride": [1, 1], "offset": [0, 0], "coverage": 1.0, "num_units": 81}
    ]
    assert float(found.fields["radius"].max()) == 0
    assert len(found.layer.left_units) == 0


@pytest.mark.parametrize("num_units", [0, 1, 5])
def test_all_zero_weight(num_units: int) -> None:
    geometry = Geometry.of_image(ImageShape(2, 5, 5))
    inputs = torch.randn(20, 50)
    found = extract(torch.zeros(num_units, 50), geometry, inputs)
    assert found.lattices == []
    assert torch.equal(found.layer(inputs), torch.zeros(20, num_units))
    assert float(found.layer.unrolled_l1().detach()) == 0
    assert found.layer.num_weights == 0
    assert all(bool(torch.isfinite(t).all()) for t in found.fields.values())
    assert found.geometry.channel.tolist() == [-1] * num_units


def test_one_unit_is_left_over() -> None:
    geometry = Geometry.of_image(ImageShape(1, 6, 6))
    weight = torch.zeros(1, 36)
    weight[0, [7, 8, 14]] = torch.tensor([1.0, -2.0, 0.5])
    inputs = torch.randn(50, 36)
    found = extract(weight, geometry, inputs)
    assert found.layer.left_units.tolist() == [0]
    torch.testing.assert_close(found.layer(inputs), inputs @ weight.T)


def test_dense_random_rows_have_no_kernel() -> None:
    geometry = Geometry.of_image(ImageShape(1, 10, 10))
    weight = torch.randn(60, 100, generator=generator(5), dtype=torch.float64)
    inputs = torch.randn(300, 100, generator=generator(6), dtype=torch.float64)
    found = extract(weight, geometry, inputs)
    assert len(found.layer.left_units) == 60
    torch.testing.assert_close(found.layer(inputs), inputs @ weight.T)


class ThreadAxis(Axis):
    """Threads of one process standing in for the processes of an axis."""

    def __init__(self, rank: int, size: int, shared: list[Tensor], barrier: threading.Barrier):
        self.rank, self.size, self.shared, self.barrier = rank, size, shared, barrier

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self.shared[self.rank] = tensor.clone()
        self.barrier.wait(60)
        tensors = [t.clone() for t in self.shared]
        self.barrier.wait(60)
        return tensors

    def sum(self, tensor: Tensor) -> Tensor:
        tensors = self._exchange(tensor)
        total = tensors[0]
        for other in tensors[1:]:
            total = total + other
        tensor.copy_(total)  # as an all-reduce does
        return tensor

    def gather(self, tensor: Tensor, total: int, dim: int = 0) -> Tensor:
        joined = torch.cat(self._exchange(tensor), dim)
        assert joined.shape[dim] == total
        return joined


def on_shards(size: int, weight: Tensor, *args: object) -> list[object]:
    shared, barrier = [weight] * size, threading.Barrier(size)
    results: list[object] = [None] * size

    def run(rank: int) -> None:
        axis = ThreadAxis(rank, size, shared, barrier)
        own = axis.shard(len(weight))
        rows = weight[own.start : own.stop]
        try:
            results[rank] = extract_layer(rows, None, len(weight), *args, axis)  # type: ignore[arg-type]
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(("size", "num_rows"), [(2, None), (3, None), (4, 5)])
def test_shards_find_what_one_process_finds(size: int, num_rows: int | None) -> None:
    """Noisy kernels with left-overs; (4, 5): the last process holds no row at all."""
    weight, _, geometry = planted_layer(2, 3, 1, "reflect", size=10, seed=3)
    weight = weight + 0.1 * torch.randn(weight.shape, generator=generator(1)).double() * (
        weight != 0
    )
    weight[7] = torch.randn(len(geometry), generator=generator(9)).double()
    weight = weight[:num_rows]
    inputs = smooth_images(300, geometry)
    alone = extract(weight, geometry, inputs)
    for other in on_shards(size, weight, geometry, inputs, ExtractConfig()):
        if isinstance(other, BaseException):
            raise other
        assert other.padding == alone.padding
        assert other.lattices == alone.lattices
        for name, values in alone.fields.items():
            torch.testing.assert_close(other.fields[name], values, rtol=1e-9, atol=1e-9)
        ours, theirs = alone.layer.state_dict(), other.layer.state_dict()
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(theirs[name], ours[name], rtol=1e-9, atol=1e-9)


def test_twice_gives_the_same_bits() -> None:
    weight, _, geometry = planted_layer(3, 3, 1, "zeros", size=10, seed=4)
    inputs = smooth_images(300, geometry)
    first, second = (extract(weight, geometry, inputs).layer.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_wrong_inputs_say_what_to_do() -> None:
    geometry = Geometry.of_image(ImageShape(1, 4, 4))
    weight, inputs = torch.randn(6, 16), torch.randn(9, 16)
    with pytest.raises(InputError, match="pass \\(m, 16\\)"):
        extract(weight, geometry, inputs[:, :5])
    with pytest.raises(InputError, match="places 16 inputs"):
        extract(weight[:, :7], geometry, inputs)
    with pytest.raises(InputError, match="not finite"):
        extract(weight / 0, geometry, inputs)
    with pytest.raises(InputError, match=r"extract\.window=4"):
        extract(weight, geometry, inputs, window=4)
    with pytest.raises(InputError, match=r"extract\.padding='same'"):
        extract(weight, geometry, inputs, padding="same")


def test_variants_that_tile_together_are_one_channel() -> None:
    """Two alike kernels on a checkerboard: two kernels, one channel. On all places: two channels."""
    g = generator(11)
    shape = ImageShape(1, 12, 12)
    geometry = Geometry.of_image(shape)
    one = torch.randn(1, 1, 3, 3, generator=g, dtype=torch.float64)
    other = one + 0.4 * one.abs().mean() * torch.randn(one.shape, generator=g).double()
    rows = unroll(convolution(torch.cat([one, other]), shape, 1, "zeros"), shape.numel)
    black = (geometry.y + geometry.x) % 2 == 0
    mixed = torch.where(black[:, None], rows[:144], rows[144:])
    inputs = smooth_images(400, geometry)
    checkered = extract(mixed, geometry, inputs)
    assert [c.kernels for c in checkered.channels] == [(0, 1)]
    assert checkered.channels[0].lattice.coverage == 1
    assert checkered.geometry.shape == shape
    both = extract(rows, geometry, inputs)
    assert [c.num_units for c in both.channels] == [144, 144]
    assert both.geometry.shape == ImageShape(2, 12, 12)


def test_kernel_with_more_taps_than_its_units_have_weights_is_none() -> None:
    """Four translates of three far-apart weights: a 7×7 kernel would be longer than their rows."""
    geometry = Geometry.of_image(ImageShape(1, 12, 12))
    weight = torch.zeros(4, 12, 12, dtype=torch.float64)
    for i in range(4):
        weight[i, 2, 2 + i], weight[i, 8, 2 + i], weight[i, 5, 7 + i] = 1.0, -0.7, 0.6
    weight = weight.flatten(1)
    inputs = torch.randn(300, 144, generator=generator(1), dtype=torch.float64)
    found = extract(weight, geometry, inputs)
    assert found.layer.num_kernels == 0
    assert found.layer.num_weights == 12
    torch.testing.assert_close(found.layer(inputs), inputs @ weight.T)


def test_left_over_rows_that_are_too_many_are_refused(monkeypatch) -> None:
    g = generator(11)
    weight = torch.randn(60, 144, generator=g, dtype=torch.float64)
    geometry = Geometry.of_image(ImageShape(1, 12, 12))
    inputs = torch.randn(100, 144, generator=g, dtype=torch.float64)
    assert len(extract(weight, geometry, inputs).layer.left_units) == 60
    # A weight takes 8 bytes where it is held, and 16 as one of a left-over row.
    monkeypatch.setattr(extraction, "BUFFER", weight.nbytes - 1)
    with pytest.raises(InputError, match=r"8640 weights.*no convolution.*prune\.sparsity"):
        extract(weight, geometry, inputs)
    monkeypatch.setattr(extraction, "BUFFER", weight.nbytes)
    extract(weight, geometry, inputs)
