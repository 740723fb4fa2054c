"""Mean, covariance and power spectrum of images in one pass; ZCA and Fourier whitening with them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dense2conv.data.source import ImageSource, WrappedSource
from dense2conv.shapes import SINGLE, Axis

_BLOCK = 512  # images that are in memory at once
_BLOCK_NUMBERS = 1 << 22  # pixels of them, where they may be large


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


def power_spectrum(source: ImageSource, num_samples: int, axis: Axis = SINGLE.samples) -> Tensor:
    """(H, W, C, C) complex128: the channels' mean cross-spectra E[x̂ x̂ᴴ] at each frequency.

    x̂ is the unitary transform of a standardised image that goes on beyond its edges as it does at the
    opposite ones; white noise of variance 1 has the identity everywhere. Arguments as for ``moments``.
    """
    shape = source.geometry.shape
    size, channels = (shape.height, shape.width), shape.channels
    sums = torch.zeros(*size, channels, channels, dtype=torch.complex128)
    own = axis.shard(num_samples)
    block_size = max(1, _BLOCK_NUMBERS // len(source.geometry))
    for start in range(own.start, own.stop, block_size):
        block = range(start, min(start + block_size, own.stop))
        images = source.read_training_sample(num_samples, block)
        x = source.standardise(images.pixels).double().unflatten(1, (channels, *size))
        x_hat = torch.fft.fft2(x, norm="ortho")  # (n, C, H, W)
        sums += torch.einsum("nchw,ndhw->hwcd", x_hat, x_hat.conj())
    return torch.view_as_complex(axis.sum(torch.view_as_real(sums))) / num_samples


class FourierWhitened(WrappedSource):
    """A source whose images are filtered by (S(f) + ridge·I)^-½, S their mean power spectrum.

    One filter for all places, wrapped around the edges: it commutes with shifts, and of a grey image
    it keeps every phase. Colour channels are decorrelated at each frequency. Where the covariance of all
    pixels is too large for ZCA, this takes a number a pixel and pair of channels. (Field, 1987;
    Olshausen and Field, 1996)
    """

    def __init__(self, source: ImageSource, spectrum: Tensor, ridge: float) -> None:
        super().__init__(source)
        power, axes = torch.linalg.eigh(spectrum)  # (H, W, C), (H, W, C, C)
        scale = (power.clamp(min=0) + ridge).rsqrt().to(axes.dtype)
        whitening = axes * scale[..., None, :] @ axes.mH  # (H, W, C, C)
        width = source.geometry.shape.width
        self._whitening = whitening[:, : width // 2 + 1].to(torch.complex64)

    def standardise(self, pixels: Tensor) -> Tensor:
        shape = self._source.geometry.shape
        x = self._source.standardise(pixels).unflatten(1, (shape.channels, shape.height, -1))
        self._whitening = self._whitening.to(x.device)
        x_hat = torch.einsum("hwcd,ndhw->nchw", self._whitening, torch.fft.rfft2(x))
        return torch.fft.irfft2(x_hat, s=x.shape[-2:]).flatten(1)  # (n, D)

    def fingerprint(self) -> str:
        return f"{self._source.fingerprint()}-fourier"


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

    def fingerprint(self) -> str:
        return f"{self._source.fingerprint()}-zca"
