"""Random patches of photographs that are held in memory."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dense2conv.data.config import TILES, DataConfig
from dense2conv.data.encoded import fingerprint_of
from dense2conv.data.photographs import load_photographs
from dense2conv.data.source import HELD_OUT, SAMPLE, TRAIN, Images, ImageSource, standardised
from dense2conv.rng import PATCHES, generator
from dense2conv.shapes import Geometry


class Patches(ImageSource):
    """Square patches at random places of random photographs, each photograph equally likely."""

    def __init__(self, config: DataConfig, seed: int, progress: bool = False) -> None:
        photographs = load_photographs(config, progress)
        self.geometry = Geometry.of_image(config.shape)
        self._seed = seed
        self._train = _PixelStore(photographs.train, config.side)
        self._held_out = _PixelStore(photographs.held_out, config.side)
        self.mean, self.std = self._train.moments()

    def read(self, step: int, batch: int, rows: range) -> Images:
        return self._draw(self._train, (self._seed, PATCHES, TRAIN, step), batch, rows)

    def read_training_sample(self, num: int, rows: range | None = None) -> Images:
        return self._draw(self._train, (0, PATCHES, SAMPLE), num, rows)

    def read_held_out(self, num: int, rows: range | None = None) -> Images:
        return self._draw(self._held_out, (0, PATCHES, HELD_OUT), num, rows)

    def standardise(self, pixels: Tensor) -> Tensor:
        return standardised(pixels, self.mean, self.std)

    def fingerprint(self) -> str:
        return self._train.fingerprint()

    def _draw(
        self, store: _PixelStore, name: tuple[int, ...], num: int, rows: range | None
    ) -> Images:
        # Places are drawn for all ``num``, three numbers a sample, and only own rows are read.
        places = torch.rand(num, 3, generator=generator(*name), dtype=torch.float64)
        rows = range(num) if rows is None else rows
        return Images(store.read(places[rows.start : rows.stop]).flatten(1))


class Mosaics(ImageSource):
    """Images that are each a 3×3 mosaic of independent natural patches.

    Pixels of one tile are dependent and those of two tiles are not, so a network that learns
    dependence has to find the tiles. (Yuan et al., Learning Structures for Deep Neural Networks, 2014)
    """

    def __init__(self, config: DataConfig, tiles: Patches) -> None:
        self.geometry = Geometry.of_image(config.shape)
        self._tiles = tiles

    def read(self, step: int, batch: int, rows: range) -> Images:
        return self._laid(self._tiles.read(step, batch * TILES**2, self._tiles_of(rows)))

    def read_training_sample(self, num: int, rows: range | None = None) -> Images:
        rows = self._tiles_of(range(num) if rows is None else rows)
        return self._laid(self._tiles.read_training_sample(num * TILES**2, rows))

    def read_held_out(self, num: int, rows: range | None = None) -> Images:
        rows = self._tiles_of(range(num) if rows is None else rows)
        return self._laid(self._tiles.read_held_out(num * TILES**2, rows))

    def standardise(self, pixels: Tensor) -> Tensor:
        return standardised(pixels, self._tiles.mean, self._tiles.std)

    def fingerprint(self) -> str:
        return f"{self._tiles.fingerprint()}-mosaic"

    def _tiles_of(self, rows: range) -> range:
        return range(rows.start * TILES**2, rows.stop * TILES**2)

    def _laid(self, tiles: Images) -> Images:
        """Nine tiles (9·n, C·s²) side by side: (n, C·(3s)²)."""
        shape = self._tiles.geometry.shape
        grid = tiles.pixels.view(
            -1, TILES, TILES, shape.channels, shape.height, shape.width
        )  # (n, 3, 3, C, s, s)
        return Images(grid.permute(0, 3, 1, 4, 2, 5).flatten(1))


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

    def fingerprint(self) -> str:
        """Of all sizes and pixels."""
        sizes = [self._height.tolist(), self._width.tolist(), zlib.crc32(self._pixels.numpy().data)]
        return f"{len(self._height)}-{fingerprint_of([str(sizes)])[:12]}"

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
