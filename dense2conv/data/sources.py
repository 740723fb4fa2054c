"""Where batches come from: random patches of photographs, or noise.

m   samples of the global batch     D = C·side²   flattened pixels, channel first
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dense2conv.data.config import DataConfig
from dense2conv.data.photographs import load_photographs
from dense2conv.rng import IMAGES, NOISE, PATCHES, PERMUTATION, generator, normal_rows
from dense2conv.shapes import Geometry

_TRAIN, _HELD_OUT, _SAMPLE = range(3)


class ImageSource(Protocol):
    """Standardised, flattened images: mean 0 a channel and one variance of 1 over all pixels."""

    geometry: Geometry

    def batch(self, step: int, batch: int, rows: range) -> Tensor:
        """Rows ``rows`` of the global training batch of a step: (len(rows), D) float32, no noise."""

    def training_sample(self, num: int) -> Tensor:
        """(num, D) training images, always the same ones, for analysis and fitting."""

    def held_out(self, num: int) -> Tensor:
        """(num, D) images from other photographs than the training ones, always the same."""


def open_source(config: DataConfig, seed: int, progress: bool = False) -> ImageSource:
    """The source that ``config`` names.

    Raises:
        InputError: a folder is missing or holds too few usable images.
    """
    config.validate()
    source: ImageSource = (
        WhiteNoise(config, seed) if config.kind == "noise" else Patches(config, seed, progress)
    )
    return PermutedPixels(source) if config.permute_pixels else source


def add_input_noise(x: Tensor, std: float, seed: int, step: int, rows: range) -> Tensor:
    """``x`` (len(rows), D) plus the step's own Gaussian noise; the same numbers on any mesh."""
    if std == 0:
        return x
    return x + std * normal_rows((seed, NOISE, step), rows, x.shape[1]).to(x)


class Patches:
    """Square patches at random places of random photographs, each photograph equally likely."""

    def __init__(self, config: DataConfig, seed: int, progress: bool = False) -> None:
        photographs = load_photographs(config, progress)
        self.geometry = Geometry.of_image(config.shape)
        self._seed = seed
        self._train = _PixelStore(photographs.train, config.side)
        self._held_out = _PixelStore(photographs.held_out, config.side)
        self._mean, self._std = self._train.moments()

    def batch(self, step: int, batch: int, rows: range) -> Tensor:
        return self._draw(self._train, (self._seed, PATCHES, _TRAIN, step), batch, rows)

    def training_sample(self, num: int) -> Tensor:
        return self._draw(self._train, (0, PATCHES, _SAMPLE), num, range(num))

    def held_out(self, num: int) -> Tensor:
        return self._draw(self._held_out, (0, PATCHES, _HELD_OUT), num, range(num))

    def _draw(self, store: _PixelStore, name: tuple[int, ...], batch: int, rows: range) -> Tensor:
        # The whole batch's places are drawn, three numbers a sample, and only own rows are read.
        places = torch.rand(batch, 3, generator=generator(*name), dtype=torch.float64)
        pixels = store.read(places[rows.start : rows.stop])  # (len(rows), C, side²) uint8
        return ((pixels - self._mean) / self._std).flatten(1)


class _PixelStore:
    """All photographs in one flat buffer, so that a batch is a single gather."""

    def __init__(self, photographs: Sequence[np.ndarray], side: int) -> None:
        pixels = [torch.tensor(p).flatten(0, 1).T for p in photographs]  # (C, H·W) each
        self._moments = [(p.double().mean(1), p.double().square().mean(1)) for p in pixels]
        self._pixels = torch.cat(pixels, dim=1)
        self._height = torch.tensor([p.shape[0] for p in photographs])
        self._width = torch.tensor([p.shape[1] for p in photographs])
        areas = self._height * self._width
        self._start = areas.cumsum(0) - areas
        self._side = side

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean of each channel (C, 1) and one standard deviation over all pixels, float32."""
        mean = torch.stack([first for first, _ in self._moments]).mean(0)
        second = torch.stack([second for _, second in self._moments]).mean(0)
        variance = (second - mean.square()).mean()
        return mean[:, None].float(), variance.clamp(min=1e-12).sqrt().float()

    def read(self, places: Tensor) -> Tensor:
        """Patches at ``places`` (n, 3) in [0, 1): photograph, y, x. Gives (n, C, side²) uint8."""
        photograph = (places[:, 0] * len(self._height)).long()
        y = (places[:, 1] * (self._height[photograph] - self._side + 1)).long()
        x = (places[:, 2] * (self._width[photograph] - self._side + 1)).long()
        width = self._width[photograph]
        corner = self._start[photograph] + y * width + x  # (n,)
        offset = torch.arange(self._side)
        index = corner[:, None, None] + offset[:, None] * width[:, None, None] + offset
        return self._pixels[:, index.flatten(1)].transpose(0, 1)


class WhiteNoise:
    """Independent normal pixels: the control in which there is no structure to find."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.geometry = Geometry.of_image(config.shape)
        self._seed = seed

    def batch(self, step: int, batch: int, rows: range) -> Tensor:
        return normal_rows((self._seed, IMAGES, _TRAIN, step), rows, len(self.geometry))

    def training_sample(self, num: int) -> Tensor:
        return normal_rows((0, IMAGES, _SAMPLE), range(num), len(self.geometry))

    def held_out(self, num: int) -> Tensor:
        return normal_rows((0, IMAGES, _HELD_OUT), range(num), len(self.geometry))


class PermutedPixels:
    """A source whose pixels are all shuffled by one fixed permutation: the control for locality.

    The network sees no neighbourhoods; ``geometry`` still knows where each input came from, so that
    locality measured with it is locality after un-permuting.
    """

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        num_pixels = len(source.geometry)
        self._order = torch.randperm(num_pixels, generator=generator(PERMUTATION, num_pixels))
        there = source.geometry
        self.geometry = Geometry(
            there.shape, there.channel[self._order], there.y[self._order], there.x[self._order]
        )

    def batch(self, step: int, batch: int, rows: range) -> Tensor:
        return self._source.batch(step, batch, rows)[:, self._order]

    def training_sample(self, num: int) -> Tensor:
        return self._source.training_sample(num)[:, self._order]

    def held_out(self, num: int) -> Tensor:
        return self._source.held_out(num)[:, self._order]
