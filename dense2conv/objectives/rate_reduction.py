"""Rate reduction ΔR = R − R_c (MCR², Yu et al. 2020), at a cost that hardly sees the classes.

R_c = Σ_k (m_k / 2m) logdet(I + d/(m_k ε²) Z_kᵀ Z_k)      Z_k: the m_k samples of class k
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from dense2conv.objectives.checks import require_positive
from dense2conv.objectives.classes import Classes
from dense2conv.objectives.factorisation import in_enough_digits, logdets
from dense2conv.objectives.gram import gram, small_gram
from dense2conv.objectives.logdet import LogDetSum, logdet_sum
from dense2conv.objectives.precision import at_least_fp32
from dense2conv.objectives.rates import CodingRate
from dense2conv.objectives.sums import global_shape, joined, shared, total
from dense2conv.shapes import SINGLE, InputError, Layout

_TINY = 1e-30  # under the root of a membership: at 0 the root has no derivative
_EMPTY = 1e-12  # samples of a soft class that has none


def rate_reduction(
    features: Tensor,
    labels: Tensor,
    epsilon_squared: float,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    num_features: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """ΔR = R(Z) − R_c(Z | labels) in nats, to be maximised.

    Args:
        features: (m, d) with samples as rows, or this process's block (m/dp, d/tp).
        labels: own samples' classes (m/dp,), any integers, negative where unknown: such samples
            count in R alone. Or soft memberships (m/dp, K), Π ≥ 0, a row for each sample.
        epsilon_squared: ε², the distortion.
        layout, num_samples, num_features, name: see ``logdet_i_plus``.

    Returns:
        A scalar, the same on every process, at least fp32; differentiable to any order with respect
        to features and soft memberships. Soft memberships cost K·min(m, d)³, labels do not.

    Raises:
        InputError: labels of another length or kind, or a negative membership.
        ValueError: the features hold NaN or Inf.
    """
    args = (features, labels, epsilon_squared, layout, num_samples, num_features, name)
    return _difference(*args, rate=1, class_rate=-1)


def class_coding_rate(
    features: Tensor,
    labels: Tensor,
    epsilon_squared: float,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    num_features: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """R_c(Z | labels) in nats: the rate of the samples when each class is coded on its own.

    Arguments as for :func:`rate_reduction`.
    """
    args = (features, labels, epsilon_squared, layout, num_samples, num_features, name)
    return _difference(*args, rate=0, class_rate=1)


class RateReduction(nn.Module):
    """−ΔR, to be minimised: supervised MCR²; arguments as for :class:`CodingRate`."""

    def __init__(self, epsilon_squared: float = 0.5, **options: object) -> None:
        super().__init__()
        self.rate = CodingRate(epsilon_squared, **options)  # type: ignore[arg-type]

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """features: (m/dp, d/tp); labels or memberships as for :func:`rate_reduction`."""
        z, rate = self.rate.bounded(features), self.rate
        return -rate_reduction(z, labels, rate.epsilon_squared, rate.layout, name=rate.name)


def _difference(
    features: Tensor,
    labels: Tensor,
    epsilon_squared: float,
    layout: Layout,
    num_samples: int | None,
    num_features: int | None,
    name: str,
    rate: float,
    class_rate: float,
) -> Tensor:
    """``rate``·R + ``class_rate``·R_c."""
    require_positive(epsilon_squared=epsilon_squared)
    _check(features, labels)
    m, d = global_shape(features, layout, num_samples, num_features)
    terms = LogDetSum(
        *(m, d, layout, name),
        *(0.5 * rate, d / (m * epsilon_squared)),
        class_weight=class_rate / (2 * m),
        class_alpha=d / epsilon_squared,
    )
    if labels.ndim == 1:
        classes = Classes.of(layout.samples.gather(labels.to(features.device), m, 0))
        return logdet_sum(features, replace(terms, classes=classes))
    num_negative = int(total((labels.detach() < 0).sum(), layout.samples))
    if num_negative:
        raise InputError(f"{num_negative} memberships are negative; use 0 or more")
    value = in_enough_digits(lambda z: _soft(z, labels.to(z), terms), features)
    return value.to(at_least_fp32(features.dtype))


def _check(features: Tensor, labels: Tensor) -> None:
    kind = f"labels of shape {tuple(labels.shape)} and type {labels.dtype}"
    if labels.shape[:1] != features.shape[:1] or labels.ndim not in (1, 2):
        raise InputError(
            f"{kind} for features of shape {tuple(features.shape)}; give one class for each sample, "
            "(m,), or memberships (m, K)"
        )
    if (labels.ndim == 1) == labels.is_floating_point():
        raise InputError(f"{kind}; give integers (m,), or real memberships (m, K)")


def _soft(z: Tensor, memberships: Tensor, terms: LogDetSum) -> Tensor:
    """The sum with soft classes, (I + α_k Zᵀ Π_k Z) each, K·min(m, d)³."""
    t, layout = terms, terms.layout
    sizes = total(memberships.sum(0), layout.samples).double()  # (K,)
    whole = small_gram(z, layout, t.m, t.d)
    alpha = torch.tensor(t.alpha, dtype=torch.float64, device=z.device)
    value = t.weight * logdets(whole, alpha, t.name)
    if t.is_dual:
        roots = (joined(memberships, layout.samples, t.m) + _TINY).sqrt()  # (m, K)
    else:
        # Every process's share of the features meets the same memberships.
        roots = (shared(memberships, layout.features) + _TINY).sqrt()  # (m/dp, K)
    for root, size in zip(roots.unbind(1), sizes, strict=True):
        if t.is_dual:
            class_gram = root[:, None] * whole * root
        else:
            class_gram = gram((root[:, None] * z).mT, layout.features, layout.samples, t.d)
        logdet = logdets(class_gram, t.class_alpha / size.clamp(min=_EMPTY), t.name)
        value = value + t.class_weight * size * logdet
    return value
