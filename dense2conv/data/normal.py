"""Images that are drawn, not photographed: white noise, and Gaussian images of natural covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from dense2conv.data.source import HELD_OUT, SAMPLE, TRAIN, Images, ImageSource
from dense2conv.data.whitening import Moments
from dense2conv.rng import IMAGES, normal_rows
from dense2conv.shapes import Geometry, ImageShape

_BLOCK = 64  # rows that are multiplied at once


class WhiteNoise(ImageSource):
    """Independent normal pixels: the control in which there is no structure to find."""

    def __init__(self, shape: ImageShape, seed: int) -> None:
        self.geometry = Geometry.of_image(shape)
        self._seed = seed

    def read(self, step: int, batch: int, rows: range) -> Images:
        return Images(self._rows((self._seed, IMAGES, TRAIN, step), rows))

    def read_training_sample(self, num: int, rows: range | None = None) -> Images:
        return Images(self._rows((0, IMAGES, SAMPLE), range(num) if rows is None else rows))

    def read_held_out(self, num: int, rows: range | None = None) -> Images:
        return Images(self._rows((0, IMAGES, HELD_OUT), range(num) if rows is None else rows))

    def standardise(self, pixels: Tensor) -> Tensor:
        return pixels

    def fingerprint(self) -> str:
        return "noise"

    def _rows(self, name: tuple[int, ...], rows: range) -> Tensor:
        return normal_rows(name, rows, len(self.geometry))


class GaussianImages(WhiteNoise):
    """Normal pixels of a given covariance: the control that has natural images' second moments alone.

    With linear units a rate, a power and an L1 term see no difference to the images it was measured on.
    """

    def __init__(self, shape: ImageShape, seed: int, found: Moments, of: str) -> None:
        super().__init__(shape, seed)
        self._root = found.power(0.5)  # (D, D) float64
        self._of = of

    def fingerprint(self) -> str:
        return f"{self._of}-gaussian"

    def _rows(self, name: tuple[int, ...], rows: range) -> Tensor:
        # Whole blocks that start at multiples of _BLOCK, whoever asks: a product of another shape may
        # round differently.
        first, stop = rows.start // _BLOCK * _BLOCK, -(-rows.stop // _BLOCK) * _BLOCK
        blocks = super()._rows(name, range(first, stop)).double().split(_BLOCK)
        x = torch.cat([(block @ self._root).float() for block in blocks])
        return x[rows.start - first : rows.stop - first]
