"""Two normalisations of one log-determinant."""

from __future__ import annotations

from torch import Tensor

from dense2conv.objectives.logdet import logdet_i_plus
from dense2conv.shapes import SINGLE, Layout


def coding_rate(
    features: Tensor,
    epsilon_squared: float,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    num_features: int | None = None,
) -> Tensor:
    """R(Z) = ½ logdet(I + d/(m ε²) ZᵀZ) in nats: bits-per-block of MCR² (Yu et al. 2020).

    Args:
        features: (m, d) with samples as rows, or this process's block of it.
        epsilon_squared: ε², the distortion.
        layout, num_samples, num_features: see ``logdet_i_plus``.
    """
    m = num_samples or features.shape[0] * layout.samples.size
    d = num_features or features.shape[1] * layout.features.size
    return 0.5 * logdet_i_plus(features, d / (m * epsilon_squared), layout, m, d)


def gaussian_information(
    features: Tensor,
    noise_variance: float,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    num_features: int | None = None,
) -> Tensor:
    """R(Z) = ½ logdet(I + ZᵀZ/(m σ²)) in nats: what Gaussian features tell of their input.

    Args:
        features: (m, d) with samples as rows, or this process's block of it.
        noise_variance: σ² of the noise at the output; σ² = ε²/d makes it the coding rate.
        layout, num_samples, num_features: see ``logdet_i_plus``.
    """
    m = num_samples or features.shape[0] * layout.samples.size
    return 0.5 * logdet_i_plus(features, 1 / (m * noise_variance), layout, m, num_features)
