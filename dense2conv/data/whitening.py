"""Mean and covariance of images in one pass, and ZCA whitening with them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dense2conv.data.source import ImageSource, WrappedSource
from dense2conv.shapes import SINGLE, Axis

_BLOCK = 512  # images that are in memory at once


class Moments(NamedTuple):
    """Mean (D,) and covariance (D, D) of standardised images, float64."""

    mean: Tensor
    covariance: Tensor

    @property
    def spectrum(self) -> Tensor:
        """(D,) variances along the principal components, largest first."""
        return torch.linalg.eigvalsh(self.covariance).flip(0).clamp(min=0)

    def power(self, exponent: float, ridge: float = 0.0) -> Tensor:
        """(Σ + ridge·I)^exponent, symmetric: (D, D)."""
        variances, axes = torch.linalg.eigh(self.covariance)
        scale = (variances.clamp(min=0) + ridge).pow(exponent)  # (D,)
        return (axes * scale) @ axes.T


def moments(source: ImageSource, num_samples: int, axis: Axis = SINGLE.samples) -> Moments:
    """Mean and covariance of the first ``num_samples`` images of the source's training sample.

    Sums of x and xxᵀ are taken block by block, in float64; the images are standardised, so that their mean
    is small and nothing cancels.

    Args:
        source: of the images.
        num_samples: m; the covariance is the one with 1/m.
        axis: processes that share the images among them; all of them have to call this.
    """
    num_pixels = len(source.geometry)
    sums = torch.zeros(num_pixels + 1, num_pixels, dtype=torch.float64)  # Σ x, then Σ xxᵀ
    own = axis.shard(num_samples)
    for start in range(own.start, own.stop, _BLOCK):
        block = range(start, min(start + _BLOCK, own.stop))
        images = source.read_training_sample(num_samples, block)
        x = source.standardise(images.pixels).double()  # (n, D)
        sums[0] += x.sum(0)
        sums[1:].addmm_(x.T, x)
    sums = axis.sum(sums) / num_samples
    return Moments(sums[0], sums[1:] - torch.outer(sums[0], sums[0]))


class Whitened(WrappedSource):
    """A source whose pixels are decorrelated by (Σ + ridge·I)^-½, the whitening nearest to the identity.

    Each output looks like its own pixel, so ``geometry`` stays. (Bell and Sejnowski, 1997)
    """

    def __init__(self, source: ImageSource, found: Moments, ridge: float) -> None:
        super().__init__(source)
        self._mean = found.mean.float()
        self._whitening = found.power(-0.5, ridge).float()

    def standardise(self, pixels: Tensor) -> Tensor:
        x = self._source.standardise(pixels)  # (n, D)
        if x.device != self._mean.device:
            self._mean, self._whitening = self._mean.to(x.device), self._whitening.to(x.device)
        return (x - self._mean) @ self._whitening  # (n, D)
