"""Crops of the images of a labelled set: random ones to train on, central ones to evaluate on."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from dense2conv.data.ahead import in_order
from dense2conv.data.config import DataConfig
from dense2conv.data.encoded import fingerprint_of
from dense2conv.data.order import shuffled, uniform
from dense2conv.data.skips import Pictures, UsablePictures
from dense2conv.data.source import HELD_OUT, SAMPLE, TRAIN, Images, ImageSource, standardised
from dense2conv.rng import IMAGES
from dense2conv.shapes import SINGLE, Axis, Geometry

_ORDER, _PLACE = 3, 4  # streams beside TRAIN, HELD_OUT and SAMPLE
_NO_FLIP, _CENTRE = 1.0, 0.5
_ROWS_A_TASK = 16
_BLOCK = 256  # images of the sample that are in memory at once


class Crops(ImageSource):
    """Square crops of a set's images, each image once an epoch, mirrored at random with ``data.flip``.

    Sample c = step·batch + row of the run is image c mod N of epoch c // N, at a place drawn for c: a pure
    function of (seed, c), so a run restarts in the middle of an epoch, on any mesh, with no image lost
    or repeated. Held-out images are cropped at their centre; when more are asked for than there are, they
    come again, at random places that are always the same.

    Args:
        config: side, flip, workers, and what to do with bad images.
        seed: of the order and the places.
        train, held_out: the decoded images.
        axis: processes that measure the mean and the variance together; all have to be here.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        train: Pictures,
        held_out: Pictures,
        axis: Axis = SINGLE.samples,
    ) -> None:
        self.geometry = Geometry.of_image(config.shape)
        self.classes = train.classes
        self._config, self._seed = config, seed
        self._train = UsablePictures(train, config)
        self._held_out = UsablePictures(held_out, config)
        self._pool = ThreadPoolExecutor(config.workers, "decode")
        self._mean, self._std = self._moments(axis)

    def read(self, step: int, batch: int, rows: range) -> Images:
        counters = step * batch + np.arange(rows.start, rows.stop)
        return self._crops(self._train, counters, (self._seed, IMAGES, TRAIN))

    def read_training_sample(self, num: int, rows: range | None = None) -> Images:
        rows = range(num) if rows is None else rows
        return self._crops(self._train, np.arange(rows.start, rows.stop), (0, IMAGES, SAMPLE))

    def read_held_out(self, num: int, rows: range | None = None) -> Images:
        rows = range(num) if rows is None else rows
        return self._crops(self._held_out, np.arange(rows.start, rows.stop), (0, IMAGES, HELD_OUT))

    def standardise(self, pixels: Tensor) -> Tensor:
        return standardised(pixels, self._mean, self._std)

    def fingerprint(self) -> str:
        """Of the training images' names, from their folder on, and labels, in order; not of their bytes."""
        names = (self._train.name(i).rsplit(os.sep, 2)[-2:] for i in range(len(self._train)))
        labels = (self._train.label(i) for i in range(len(self._train)))
        parts = (f"{'/'.join(name)} {label}" for name, label in zip(names, labels, strict=True))
        return f"{len(self._train)}-{fingerprint_of(parts)[:12]}"

    def _crops(
        self, pictures: UsablePictures, counters: np.ndarray, name: tuple[int, ...]
    ) -> Images:
        images = shuffled(counters, len(pictures), *name, _ORDER)
        places = uniform(counters, 3, *name, _PLACE)  # (n, 3): y, x, mirrored
        if pictures is self._held_out:
            places[counters < len(pictures), :2] = _CENTRE
        if pictures is self._held_out or not self._config.flip:
            places[:, 2] = _NO_FLIP
        labels = np.empty(len(counters), np.int64)
        side = self._config.side
        pixels = np.empty((len(counters), self._config.channels, side, side), np.uint8)

        def fill(rows: range) -> None:
            for row in rows:
                picture = pictures[int(images[row])]
                pixels[row] = _square(picture.pixels, side, *places[row]).transpose(2, 0, 1)
                labels[row] = picture.label

        tasks = [
            range(start, min(start + _ROWS_A_TASK, len(counters)))
            for start in range(0, len(counters), _ROWS_A_TASK)
        ]
        for _ in in_order(self._pool, fill, tasks, ahead=2 * self._config.workers):
            pass
        flat = torch.from_numpy(pixels).flatten(1)  # (n, D)
        return Images(flat, torch.from_numpy(labels) if self.classes else None)

    def _moments(self, axis: Axis) -> tuple[Tensor, Tensor]:
        """Mean of each channel (C, 1) and one standard deviation over all pixels, float32.

        Sums of whole numbers below 2⁵³ are exact in float64: all meshes find the same bits.
        """
        num = self._config.statistics_samples
        shape = self.geometry.shape
        sums = torch.zeros(2, shape.channels, dtype=torch.float64)
        own = axis.shard(num)
        for start in range(own.start, own.stop, _BLOCK):
            block = range(start, min(start + _BLOCK, own.stop))
            pixels = self.read_training_sample(num, block).pixels.double()
            channels = pixels.unflatten(1, (shape.channels, -1))  # (n, C, H·W)
            sums += torch.stack([channels.sum((0, 2)), channels.square().sum((0, 2))])
        mean, second = axis.sum(sums) / (num * shape.height * shape.width)  # (C,) each
        variance = (second - mean.square()).mean()
        return mean[:, None].float(), variance.clamp(min=1e-12).sqrt().float()


def _square(picture: np.ndarray, side: int, y: float, x: float, mirrored: float) -> np.ndarray:
    """The (side, side, C) crop of a picture (H, W, C) at (y, x) in [0, 1), mirrored below ½."""
    height, width = picture.shape[:2]
    top, left = int(y * (height - side + 1)), int(x * (width - side + 1))
    square = picture[top : top + side, left : left + side]
    return square[:, ::-1] if mirrored < 0.5 else square
