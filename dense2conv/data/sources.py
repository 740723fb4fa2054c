"""From a configuration to its source of images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

from dense2conv.data.ahead import Prefetched
from dense2conv.data.cache import cached
from dense2conv.data.cifar10 import open_cifar10
from dense2conv.data.class_folders import open_class_folders
from dense2conv.data.config import SETS, TILES, DataConfig
from dense2conv.data.crops import Crops
from dense2conv.data.encoded import DecodedImages, EncodedImages
from dense2conv.data.normal import GaussianImages, WhiteNoise
from dense2conv.data.parquet import open_parquet
from dense2conv.data.patches import Mosaics, Patches
from dense2conv.data.skips import Pictures
from dense2conv.data.source import ImageSource, PermutedPixels
from dense2conv.data.tar_shards import open_tar_shards
from dense2conv.data.whitening import FourierWhitened, Whitened, moments, power_spectrum
from dense2conv.rng import NOISE, normal_rows
from dense2conv.shapes import SINGLE, WHOLE, Axis, InputError


def open_source(
    config: DataConfig, seed: int, progress: bool = False, axis: Axis = SINGLE.samples
) -> ImageSource:
    """The source that ``config`` names.

    Args:
        config: kind, size, and what is done to the pixels.
        seed: of the batches.
        progress: show a bar while images are decoded.
        axis: processes that measure means and covariances together; all of them have to call this. By
            default each measures everything, and finds the very same numbers.

    Raises:
        InputError: files are missing, or hold too few usable images.
    """
    config.validate()
    source = _images(config, seed, progress, axis)
    if config.whiten == "zca":
        found = moments(source, config.statistics_samples, axis)
        source = Whitened(source, found, config.whiten_ridge)
    elif config.whiten == "fourier":
        spectrum = power_spectrum(source, config.statistics_samples, axis)
        source = FourierWhitened(source, spectrum, config.whiten_ridge)
    return PermutedPixels(source) if config.permute_pixels else source


def add_input_noise(
    x: Tensor, std: float, seed: int, step: int, rows: range, axis: Axis = WHOLE
) -> Tensor:
    """``x`` (len(rows), D) plus the step's own Gaussian noise; the same numbers on any mesh.

    The processes along ``axis``, which have the same ``x``, draw a share of its rows each: on the
    host a number takes longer than its journey.
    """
    if std == 0:
        return x
    own = axis.shard(len(rows))
    noise = normal_rows((seed, NOISE, step), rows[own.start : own.stop], x.shape[1])
    return x + std * axis.gather(noise.to(x.device), len(rows)).to(x)


def _images(config: DataConfig, seed: int, progress: bool, axis: Axis) -> ImageSource:
    if config.kind == "noise":
        return WhiteNoise(config.shape, seed)
    if config.kind in SETS:
        train, held_out = (
            _pictures(images, part, config, progress)
            for images, part in zip(_encoded(config), ("train", "held_out"), strict=True)
        )
        return Prefetched(Crops(config, seed, train, held_out, axis), config.prefetch)
    if config.kind == "mosaic":
        tiles = dataclasses.replace(config, side=config.side // TILES)
        return Mosaics(config, Patches(tiles, seed, progress))
    patches = Patches(config, seed, progress)
    if config.kind == "gaussian":
        found = moments(patches, config.statistics_samples, axis)
        return GaussianImages(config.shape, seed, found, patches.fingerprint())
    return patches


def _encoded(config: DataConfig) -> tuple[EncodedImages, EncodedImages]:
    """(training, held-out) images of a set."""
    if config.kind == "imagenet":
        return open_class_folders(config.root or "", config.held_out_root)
    if config.kind == "webdataset":
        return open_tar_shards(config)
    if config.kind == "cifar10":
        return open_cifar10(config)
    return open_parquet(config)


def _pictures(images: EncodedImages, part: str, config: DataConfig, progress: bool) -> Pictures:
    if not len(images):
        raise InputError(f"data.root={config.root} holds no {part} images; one is needed at least")
    pictures = DecodedImages(images, config.resize, config.channels)
    if not config.cache:
        return pictures
    folder = Path(config.cache).expanduser() / f"{part}-{config.resize or 'full'}x{config.channels}"
    return cached(pictures, folder, config, progress)
