"""Slow, obvious versions of what the project does fast, written from the formulas in fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def logdet_i_plus(features: Tensor, alpha: float) -> Tensor:
    """logdet(I_d + α ZᵀZ) by the singular values of Z: exact however badly conditioned."""
    return torch.log1p(alpha * torch.linalg.svdvals(features.double()).square()).sum()


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


def coding_rate(features: Tensor, epsilon_squared: float) -> Tensor:
    """R of MCR²."""
    m, d = features.shape
    return 0.5 * logdet_i_plus(features, d / (m * epsilon_squared))


def class_coding_rate(features: Tensor, memberships: Tensor, epsilon_squared: float) -> Tensor:
    """R_c of MCR² as published: LU log-determinants of d×d matrices, one for each class."""
    z, pi = features.double(), memberships.double()
    m, d = z.shape
    value = torch.zeros((), dtype=torch.float64)
    for k in range(pi.shape[1]):
        m_k = pi[:, k].sum()
        if m_k > 0:
            second_moment = z.T @ torch.diag(pi[:, k]) @ z
            eye = torch.eye(d, dtype=torch.float64)
            logdet = torch.logdet(eye + d / (m_k * epsilon_squared) * second_moment)
            value = value + m_k / (2 * m) * logdet
    return value


def rate_reduction(features: Tensor, memberships: Tensor, epsilon_squared: float) -> Tensor:
    """ΔR of MCR²."""
    return coding_rate(features, epsilon_squared) - class_coding_rate(
        features, memberships, epsilon_squared
    )
