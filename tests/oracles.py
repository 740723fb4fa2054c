"""Slow, obvious versions of what the project does fast, written from the formulas in fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def logdet_i_plus(features: Tensor, alpha: float) -> Tensor:
    """logdet(I_d + α ZᵀZ), always primal, by LU."""
    z = features.double()
    return torch.logdet(torch.eye(z.shape[1], dtype=torch.float64) + alpha * z.T @ z)


def efficient_coding_loss(
    x: Tensor, weight: Tensor, sigma_squared: float, power: float, input_noise_std: float = 0.0
) -> Tensor:
    """−(R − (μ/2) E‖z‖²) of a linear layer, R without the information about the input noise."""
    z = x @ weight.T
    rate = 0.5 * logdet_i_plus(z, 1 / (len(z) * sigma_squared))
    rate = rate - 0.5 * logdet_i_plus(weight.T, input_noise_std**2 / sigma_squared)
    return power / 2 * z.square().sum(1).mean() - rate


def largest_magnitudes(tensors: list[Tensor], num_kept: int) -> list[Tensor]:
    """Masks of the ``num_kept`` largest |w|: a stable sort of everything, zeros never kept."""
    flat = torch.cat([t.flatten() for t in tensors]).abs()
    order = flat.sort(descending=True, stable=True).indices[:num_kept]
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order] = True
    mask &= flat != 0
    pieces = mask.split([t.numel() for t in tensors])
    return [piece.view_as(t) for piece, t in zip(pieces, tensors, strict=True)]
