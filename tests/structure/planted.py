"""Planted convolutions, unrolled by brute force, to be found again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dense2conv.shapes import Axis, Geometry, ImageShape
from dense2conv.structure import ExtractConfig, LayerExtraction, extract_layer


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unroll(apply: Callable[[Tensor], Tensor], num_inputs: int) -> Tensor:
    """(d, D): any linear map, one basis vector at a time."""
    return apply(torch.eye(num_inputs, dtype=torch.float64)).T


def convolution(
    kernels: Tensor, shape: ImageShape, stride: int, padding: str
) -> Callable[[Tensor], Tensor]:
    """From x (m, D) to (m, K·H'·W') with a padded stride-s convolution."""
    half = kernels.shape[-1] // 2

    def apply(x: Tensor) -> Tensor:
        images = x.view(-1, shape.channels, shape.height, shape.width)
        if padding != "none":
            mode = "constant" if padding == "zeros" else padding
            images = F.pad(images, (half,) * 4, mode=mode)
        return F.conv2d(images, kernels, stride=stride).flatten(1)

    return apply


def planted_layer(
    num_kernels: int,
    side: int,
    stride: int,
    padding: str,
    channels: int = 1,
    size: int = 14,
    num_dead: int = 3,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Geometry]:
    """A weight (d, D) with units permuted, signs flipped, gains, dead units; kernels; geometry."""
    g = generator(seed)
    shape = ImageShape(channels, size, size + 1)
    kernels = torch.randn(num_kernels, channels, side, side, generator=g, dtype=torch.float64)
    weight = unroll(convolution(kernels, shape, stride, padding), shape.numel)
    gain = 0.5 + torch.rand(len(weight), 1, generator=g, dtype=torch.float64)
    sign = torch.randint(2, (len(weight), 1), generator=g) * 2 - 1
    dead = torch.zeros(num_dead, shape.numel, dtype=torch.float64)
    weight = torch.cat([weight * gain * sign, dead])
    return weight[torch.randperm(len(weight), generator=g)], kernels, Geometry.of_image(shape)


def smooth_images(m: int, geometry: Geometry, seed: int = 1) -> Tensor:
    """(m, D) float64 images with much low-frequency power, as photographs have."""
    shape, g = geometry.shape, generator(seed)
    noise = torch.randn(m, shape.channels, shape.height, shape.width, generator=g).double()
    blurred = F.avg_pool2d(F.pad(noise, (2,) * 4, mode="replicate"), 5, 1) * 5
    return (noise * 0.3 + blurred).flatten(1)


def extract(
    weight: Tensor,
    geometry: Geometry,
    inputs: Tensor,
    bias: Tensor | None = None,
    axis: Axis | None = None,
    **config: Any,
) -> LayerExtraction:
    return extract_layer(
        weight, bias, len(weight), geometry, inputs, ExtractConfig(**config), axis or Axis()
    )


def same_up_to_gain(found: Tensor, planted: Tensor) -> bool:
    """Every found kernel is a multiple of another planted one."""
    a = F.normalize(found.flatten(1).double())
    b = F.normalize(planted.flatten(1).double())
    match = (a @ b.T).abs() > 1 - 1e-9
    return bool((match.sum(0) == 1).all() and (match.sum(1) == 1).all())
