"""Moments against NumPy and across ranks; what whitening, Gaussian images and mosaics must look like."""

import os

import numpy as np
import pytest
import torch

from dense2conv.data import DataConfig, Images, ImageSource, moments, open_source
from dense2conv.data.crops import Crops
from dense2conv.data.whitening import Whitened
from dense2conv.parallel import ParallelConfig, open_mesh
from dense2conv.shapes import Geometry, ImageShape, InputError
from tests.data.test_crops import Ramps
from tests.ranks import on_ranks


class Drawn(ImageSource):
    """Images of a known mean and covariance."""

    def __init__(self, num_pixels=6):
        generator = torch.Generator().manual_seed(0)
        self.geometry = Geometry.of_image(ImageShape(1, 1, num_pixels))
        self._mixing = torch.randn(num_pixels, num_pixels, generator=generator)
        self._x = torch.randn(4000, num_pixels, generator=generator) @ self._mixing + 3

    def read(self, step, batch, rows):
        return Images(self._x[rows.start : rows.stop])

    def read_training_sample(self, num, rows=None):
        return self.read(0, num, range(num) if rows is None else rows)

    read_held_out = read_training_sample

    def standardise(self, pixels):
        return pixels


@pytest.mark.parametrize("num", [2, 5, 512, 513, 2000])
def test_moments_are_numpys(num):
    source = Drawn()
    x = source.training_sample(num).double().numpy()
    found = moments(source, num)
    assert np.allclose(found.mean, x.mean(0), atol=1e-12)
    assert np.allclose(found.covariance, np.cov(x.T, bias=True), atol=1e-9)
    expected = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2 / num
    assert np.allclose(found.spectrum[: len(expected)], expected, atol=1e-9)
    assert (found.spectrum[num - 1 :] < 1e-9).all()


def _sharded():
    with open_mesh(ParallelConfig(dp=int(os.environ["WORLD_SIZE"]))) as mesh:
        found = [moments(Drawn(), num, mesh.dp) for num in (3, 700)]
        config = DataConfig(kind="imagenet", side=8, channels=3, statistics_samples=50)
        source = Crops(config, 0, Ramps(30), Ramps(5), mesh.dp)
        return found, source.batch(3, 9, range(9))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_find_together_what_one_finds(world_size):
    config = DataConfig(kind="imagenet", side=8, channels=3, statistics_samples=50)
    batch = Crops(config, 0, Ramps(30), Ramps(5)).batch(3, 9, range(9))
    for found, own_batch in on_ranks(world_size, _sharded):
        for num, one in zip((3, 700), found, strict=True):
            expected = moments(Drawn(), num)
            assert torch.allclose(one.mean, expected.mean, rtol=0, atol=1e-12)
            assert torch.allclose(one.covariance, expected.covariance, rtol=0, atol=1e-11)
        assert torch.equal(own_batch, batch)  # bit for bit: sums of whole numbers


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_whitened_images_have_the_covariance_that_the_ridge_leaves(ridge):
    source = Drawn()
    found = moments(source, 4000)
    white = Whitened(source, found, ridge)
    after = moments(white, 4000)
    left = found.covariance @ torch.linalg.inv(
        found.covariance + ridge * torch.eye(6, dtype=torch.float64)
    )
    assert torch.allclose(after.covariance, left, atol=1e-5)
    assert after.mean.abs().max() < 1e-5


def test_whitening_is_the_one_nearest_to_the_identity():
    """ZCA is symmetric: of all whitenings it leaves each pixel most like itself."""
    found = moments(Drawn(), 4000)
    whitening = found.power(-0.5)
    assert torch.allclose(whitening, whitening.T, atol=1e-12)
    assert (torch.linalg.eigvalsh(whitening) > 0).all()
    generator = torch.Generator().manual_seed(1)
    x = Drawn().training_sample(4000).double() - found.mean
    nearest = (x @ whitening - x).square().mean()
    for _ in range(20):
        turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
        assert (x @ whitening @ turn - x).square().mean() > nearest


def test_whitened_photographs_by_their_key():
    plain = open_source(DataConfig(side=8), seed=0)
    white = open_source(DataConfig(side=8, whiten="zca", statistics_samples=4000), seed=0)
    assert torch.equal(white.read(0, 9, range(9)).pixels, plain.read(0, 9, range(9)).pixels)
    covariance = torch.cov(white.held_out(4000).T)
    diagonal = covariance.diagonal()
    neighbours = covariance[0, 1] / (diagonal[0] * diagonal[1]).sqrt()
    before = torch.corrcoef(plain.held_out(4000).T)[0, 1]
    assert before > 0.8
    assert abs(neighbours) < 0.3  # other photographs than those that it was measured on
    permuted = open_source(
        DataConfig(side=8, whiten="zca", statistics_samples=4000, permute_pixels=True), seed=0
    )
    where = permuted.geometry.y * 8 + permuted.geometry.x
    assert torch.equal(permuted.batch(0, 4, range(4)), white.batch(0, 4, range(4))[:, where])


# Gaussian images and mosaics


@pytest.fixture(scope="module")
def gaussian():
    return open_source(DataConfig(kind="gaussian", side=8, statistics_samples=4000), seed=3)


def test_gaussian_images_have_natural_second_moments_and_no_others(gaussian):
    natural = open_source(DataConfig(side=8), seed=3)
    x, y = gaussian.training_sample(20_000).double(), natural.training_sample(20_000).double()
    expected = moments(natural, 4000).covariance
    error = (torch.cov(x.T) - expected).norm() / expected.norm()
    assert error < 0.03  # 20,000 draws of 64 pixels

    def kurtosis(images):
        edges = images.view(-1, 8, 8)[:, 4, 5] - images.view(-1, 8, 8)[:, 4, 4]
        return float(edges.pow(4).mean() / edges.square().mean() ** 2 - 3)

    assert abs(kurtosis(x)) < 0.3
    assert kurtosis(y) > 5


def test_gaussian_images_do_not_depend_on_who_asks(gaussian):
    whole = gaussian.batch(2, 200, range(200))
    for rows in (range(0, 100), range(63, 65), range(100, 200), range(70, 70)):
        assert torch.equal(gaussian.batch(2, 200, rows), whole[rows.start : rows.stop])
    assert torch.equal(gaussian.held_out(70)[:5], gaussian.held_out(5))
    assert not torch.equal(gaussian.batch(3, 200, range(200)), whole)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_mosaic_is_nine_independent_patches(channels):
    source = open_source(DataConfig(kind="mosaic", side=12, channels=channels), seed=0)
    tiles = open_source(DataConfig(side=4, channels=channels), seed=0)
    batch = source.batch(5, 6, range(6)).view(6, channels, 12, 12)
    patches = tiles.batch(5, 54, range(54)).view(6, 3, 3, channels, 4, 4)
    for y in range(3):
        for x in range(3):
            tile = batch[:, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
            assert torch.equal(tile, patches[:, y, x])
    assert torch.equal(source.batch(5, 6, range(2, 5)), batch[2:5].flatten(1))
    assert torch.equal(source.held_out(6)[:, :1].isfinite(), torch.ones(6, 1, dtype=torch.bool))


def test_pixels_of_two_tiles_are_independent_and_those_of_one_are_not():
    x = (
        open_source(DataConfig(kind="mosaic", side=12), seed=0)
        .training_sample(5000)
        .view(-1, 12, 12)
    )
    within = torch.corrcoef(torch.stack([x[:, 5, 5], x[:, 5, 6]]))[0, 1]
    across = torch.corrcoef(torch.stack([x[:, 5, 7], x[:, 5, 8]]))[0, 1]
    assert within > 0.8
    assert abs(across) < 0.06  # four standard errors


def test_mosaics_and_gaussian_images_of_ones_own_photographs(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        open_source(DataConfig(kind="mosaic", side=12, root=str(tmp_path / "absent")), seed=0)
    with pytest.raises(InputError, match="holds no images"):
        open_source(DataConfig(kind="gaussian", root=str(tmp_path)), seed=0)
