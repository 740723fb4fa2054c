"""What a source of images is: pixels first, standardised only on the device that uses them.

m   samples of the global batch     D = C·side²   flattened pixels, channel first
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from dense2conv.rng import PERMUTATION, generator
from dense2conv.shapes import Geometry

# Which images of a stream, part of its name.
TRAIN, HELD_OUT, SAMPLE = range(3)


class Images(NamedTuple):
    """Flattened images and what they show.

    pixels: (n, D) uint8, or float32 where images are drawn rather than photographed.
    labels: (n,) int64, -1 for an image without one; None where the source has none at all.
    """

    pixels: Tensor
    labels: Tensor | None = None


class ImageSource(ABC):
    """Batches that are a pure function of (seed, step), in two steps: ``read``, then ``standardise``.

    Whoever shares a batch may read a part of its rows each, gather the uint8 pixels, and
    standardise the whole where it is used.
    """

    geometry: Geometry
    classes: tuple[str, ...] = ()
    """Names of the labels, by label; empty where the source has no labels."""

    @abstractmethod
    def read(self, step: int, batch: int, rows: range) -> Images:
        """Rows ``rows`` of the global training batch of a step."""

    @abstractmethod
    def read_training_sample(self, num: int, rows: range | None = None) -> Images:
        """``num`` training images, always the same ones, or those of their ``rows``."""

    @abstractmethod
    def read_held_out(self, num: int, rows: range | None = None) -> Images:
        """``num`` images that are not trained on, always the same ones, or those of their ``rows``."""

    @abstractmethod
    def standardise(self, pixels: Tensor) -> Tensor:
        """(n, D) float32 on the device of ``pixels``: mean 0, and one variance of 1 over all pixels."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A short name of the images and of what is done to them, the same wherever they lie."""

    def failure_ahead(self, num_batches: int) -> Exception | None:
        """Why one of the ``num_batches`` behind the batch that was read last cannot be read.

        Waits until they have been tried. None: they are there, or this source fails at no batch.
        """
        return None

    def batch(self, step: int, batch: int, rows: range) -> Tensor:
        """Rows ``rows`` of the global training batch of a step: (len(rows), D) float32, no noise."""
        return self.standardise(self.read(step, batch, rows).pixels)

    def training_sample(self, num: int) -> Tensor:
        """(num, D) training images, always the same ones, for analysis and fitting."""
        return self.standardise(self.read_training_sample(num).pixels)

    def held_out(self, num: int) -> Tensor:
        """(num, D) images from other photographs than the training ones, always the same."""
        return self.standardise(self.read_held_out(num).pixels)


class WrappedSource(ImageSource):
    """Another source, of which a subclass changes one thing."""

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self.geometry = source.geometry
        self.classes = source.classes

    def read(self, step: int, batch: int, rows: range) -> Images:
        return self._source.read(step, batch, rows)

    def failure_ahead(self, num_batches: int) -> Exception | None:
        return self._source.failure_ahead(num_batches)

    def read_training_sample(self, num: int, rows: range | None = None) -> Images:
        return self._source.read_training_sample(num, rows)

    def read_held_out(self, num: int, rows: range | None = None) -> Images:
        return self._source.read_held_out(num, rows)

    def standardise(self, pixels: Tensor) -> Tensor:
        return self._source.standardise(pixels)

    def fingerprint(self) -> str:
        return self._source.fingerprint()


class PermutedPixels(WrappedSource):
    """A source whose pixels are all shuffled by one fixed permutation: the control for locality.

    The network sees no neighbourhoods; ``geometry`` still knows where each input came from, so that
    locality measured with it is locality after un-permuting. ``read`` gives pixels in their places.
    """

    def __init__(self, source: ImageSource) -> None:
        super().__init__(source)
        self._order = pixel_order(len(source.geometry))
        self.geometry = permuted(source.geometry)

    def standardise(self, pixels: Tensor) -> Tensor:
        return self._source.standardise(pixels)[:, self._order.to(pixels.device)]

    def fingerprint(self) -> str:
        return f"{self._source.fingerprint()}-permuted"


def pixel_order(num_pixels: int) -> Tensor:
    """(num_pixels,) the pixel that each input shows under ``data.permute_pixels``."""
    return torch.randperm(num_pixels, generator=generator(PERMUTATION, num_pixels))


def permuted(there: Geometry) -> Geometry:
    """Where the inputs lie whose pixels ``data.permute_pixels`` has shuffled."""
    order = pixel_order(len(there))
    return Geometry(there.shape, there.channel[order], there.y[order], there.x[order])


def standardised(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(n, D) float32 of ``pixels`` (n, D), less each channel's ``mean`` (C, 1), over one ``std``."""
    channels = pixels.unflatten(1, (len(mean), -1))  # (n, C, H·W)
    return ((channels - mean.to(pixels.device)) / std.to(pixels.device)).flatten(1)  # (n, D)
