"""Moments against NumPy and across ranks; what whitening, Gaussian images and mosaics must look like."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from dense2conv.data import DataConfig, Images, ImageSource, moments, open_source
from dense2conv.data.crops import Crops
from dense2conv.data.whitening import FourierWhitened, Whitened, power_spectrum
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

    def fingerprint(self):
        return "drawn"


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
        return found, source.batch(3, 9, range(9)), power_spectrum(source, 50, mesh.dp)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_find_together_what_one_finds(world_size):
    config = DataConfig(kind="imagenet", side=8, channels=3, statistics_samples=50)
    batch = Crops(config, 0, Ramps(30), Ramps(5)).batch(3, 9, range(9))
    spectrum = power_spectrum(Crops(config, 0, Ramps(30), Ramps(5)), 50)
    for found, own_batch, own_spectrum in on_ranks(world_size, _sharded):
        assert torch.allclose(own_spectrum, spectrum, rtol=0, atol=1e-11)
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


# ---- one filter for all places


class Correlated(Drawn):
    """Pictures of two channels, odd and even sides, whose pixels and channels depend on each other."""

    def __init__(self, channels=2, height=5, width=6):
        generator = torch.Generator().manual_seed(0)
        shape = ImageShape(channels, height, width)
        self.geometry = Geometry.of_image(shape)
        x = torch.randn(3000, channels, height, width, generator=generator)
        x = x + 0.7 * x.roll(1, -1) + 0.5 * x.roll(1, -2)
        mixing = torch.tensor([[1.0, 0.6], [0.2, 1.0]])[:channels, :channels]
        self._x = torch.einsum("nchw,cd->ndhw", x, mixing).flatten(1)


def _transform(x, shape):
    pictures = x.double().numpy().reshape(-1, shape.channels, shape.height, shape.width)
    return np.fft.fft2(pictures, norm="ortho")


@pytest.mark.parametrize("num", [1, 7, 3000])
def test_the_power_spectrum_is_numpys(num):
    source = Correlated()
    x_hat = _transform(source.training_sample(num), source.geometry.shape)
    expected = np.einsum("nchw,ndhw->hwcd", x_hat, x_hat.conj()) / num
    assert np.allclose(power_spectrum(source, num), expected, atol=1e-10)


@pytest.mark.parametrize(("channels", "ridge"), [(1, 1e-9), (1, 0.5), (2, 1e-9), (2, 0.5)])
def test_fourier_whitening_leaves_what_the_ridge_leaves_at_every_frequency(channels, ridge):
    source = Correlated(channels)
    spectrum = power_spectrum(source, 3000)
    white = FourierWhitened(source, spectrum, ridge)
    found = power_spectrum(white, 3000)
    left = torch.linalg.inv(spectrum + ridge * torch.eye(channels)) @ spectrum
    assert torch.allclose(
        torch.linalg.eigvals(found).real.sort().values,
        torch.linalg.eigvals(left).real.sort().values,
        atol=1e-5,
    )
    if channels == 2 and ridge < 1e-6:
        assert torch.allclose(found, torch.eye(2).to(found).expand_as(found), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2])
def test_fourier_whitening_commutes_with_shifts(channels):
    source = Correlated(channels)
    white = FourierWhitened(source, power_spectrum(source, 3000), 0.01)
    shape = source.geometry.shape
    x = source.training_sample(10).view(-1, shape.channels, shape.height, shape.width)
    shifted = x.roll((2, 3), (-2, -1))
    expected = white.standardise(x.flatten(1)).view_as(x).roll((2, 3), (-2, -1))
    assert torch.allclose(white.standardise(shifted.flatten(1)).view_as(x), expected, atol=1e-5)


def test_fourier_whitening_keeps_the_phases_of_grey_images():
    source = Correlated(1)
    white = FourierWhitened(source, power_spectrum(source, 3000), 0.01)
    x = source.training_sample(10)
    before, after = (_transform(v, source.geometry.shape) for v in (x, white.standardise(x)))
    assert np.abs(np.angle(after / before)).max() < 1e-3


def test_fourier_whitening_by_its_key_takes_sides_that_zca_cannot():
    config = DataConfig(side=160, channels=3, whiten="fourier", statistics_samples=40)
    white = open_source(config, seed=0)
    assert white.geometry.shape == ImageShape(3, 160, 160)
    x = white.held_out(4)
    assert x.isfinite().all()
    plain = open_source(DataConfig(side=160, channels=3), seed=0).held_out(4)

    def slope(images):
        """How power falls from low to high frequencies, decades."""
        power = np.square(np.abs(_transform(images, white.geometry.shape))).mean((0, 1))
        return np.log10(power[1:9, 1:9].mean() / power[60:80, 60:80].mean())

    assert slope(plain) > 2.5
    assert abs(slope(x)) < 1.5


# ---- what images are called


def test_a_fingerprint_is_the_same_wherever_the_set_lies_and_changes_with_it(tmp_path):
    def named(folder):
        config = DataConfig(kind="imagenet", root=str(tmp_path / folder), side=4, channels=3)
        return open_source(config, 0).fingerprint()

    for folder in ("a", "b/c"):
        for name in ("x", "y"):
            path = tmp_path / folder / "train" / name
            path.mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (9, 9), (i, 0, 0)).save(path / f"{i}.png")
    whole = named("a")
    assert whole == named("b/c")
    assert whole.startswith("14-")
    (tmp_path / "a/train/x/7.png").unlink()
    fewer = named("a")
    assert fewer != whole
    Image.new("RGB", (9, 9)).save(tmp_path / "a/train/x/8.png")
    assert named("a") not in (whole, fewer)


def test_fingerprints_name_what_is_done_to_the_pixels():
    def named(**changes):
        return open_source(DataConfig(side=6, statistics_samples=100, **changes), 0).fingerprint()

    found = [
        named(),
        named(whiten="zca"),
        named(whiten="fourier"),
        named(permute_pixels=True),
        named(kind="gaussian"),
        named(kind="mosaic"),
        named(kind="noise"),
        named(channels=3),
    ]
    assert len(set(found)) == len(found)
    assert named() == found[0]
