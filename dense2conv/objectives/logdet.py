"""The one primitive: logdet(I + α ZᵀZ), always on the small side, for spread samples and features.

    m   samples, spread over ``layout.samples`` (dp)     d   features, over ``layout.features`` (tp)

Both sides give the same number (Sylvester): the primal factorises d×d, the dual m×m.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dense2conv.shapes import SINGLE, Layout

# Rounding of an fp32 product relative to λ_max, and what may be lost of the smallest eigenvalue, 1.
_FP32_EPS, _TOLERANCE = 6e-8, 1e-4


def logdet_i_plus(
    features: Tensor,
    alpha: float,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    num_features: int | None = None,
) -> Tensor:
    """logdet(I + α ZᵀZ) of the whole (m, d) matrix Z, of which every process holds one block.

    The Gram matrix is accumulated in the features' precision, at least fp32, or in fp64 where
    fp32 would lose its smallest eigenvalues; the factorisation is in fp64.

    Args:
        features: (m/dp, d/tp), the block held here; all of Z on one process.
        alpha: a positive number.
        layout: how Z is spread.
        num_samples, num_features: m and d, where the caller knows them; otherwise they are summed.

    Returns:
        A scalar, the same on every process, in the features' precision, at least fp32. Its
        gradient with respect to ``features`` is that of the one whole-batch value: 2α (I + αZZᵀ)⁻¹
        Z, own block.

    Raises:
        ValueError: the features hold NaN or Inf.
    """
    m = _total(features, 0, num_samples, layout)
    d = _total(features, 1, num_features, layout)
    return _LogDetIPlus.apply(features, alpha, layout, m, d)


def _total(features: Tensor, dim: int, given: int | None, layout: Layout) -> int:
    axis = layout.samples if dim == 0 else layout.features
    if given is not None or axis.size == 1:
        return features.shape[dim] if given is None else given
    return int(axis.sum(torch.tensor(features.shape[dim], device=features.device)))


class _LogDetIPlus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, alpha: float, layout: Layout, m: int, d: int) -> Tensor:
        # Half precision has too few digits for a Gram matrix: 8 bits lose every small eigenvalue.
        z = features.float() if features.dtype in (torch.bfloat16, torch.float16) else features
        primal = d <= m
        whole = _whole_small_side(z, layout, m, d, primal)
        gram = _gram(z, whole, layout, m, d, primal)
        ctx.accumulate = z.dtype
        if z.dtype == torch.float32 and _loses_digits(gram, alpha):
            ctx.accumulate = torch.float64
            gram = _gram(z.double(), whole.double(), layout, m, d, primal)
        i_plus = gram.double().mul_(alpha)
        i_plus.diagonal().add_(1)
        factor, info = torch.linalg.cholesky_ex(i_plus)
        if info.item():
            raise ValueError(
                "the features hold NaN or Inf"
                if not bool(i_plus.isfinite().all())
                else "I + αG is not positive definite: features too large for fp64"
            )
        ctx.save_for_backward(whole, torch.cholesky_inverse(factor))
        ctx.alpha, ctx.layout, ctx.primal, ctx.m, ctx.d = alpha, layout, primal, m, d
        ctx.dtype = features.dtype
        return (2 * factor.diagonal().log().sum()).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        whole, inverse = ctx.saved_tensors
        # The inverse removes what is large in Z: that cancels as the Gram matrix does.
        inverse, whole = inverse.to(ctx.accumulate), whole.to(ctx.accumulate)
        if ctx.primal:
            own = _slice(ctx.layout.features.shard(ctx.d))
            grad = whole @ inverse[:, own]  # (m/dp, d) @ (d, d/tp)
        else:
            own = _slice(ctx.layout.samples.shard(ctx.m))
            grad = inverse[own] @ whole  # (m/dp, m) @ (m, d/tp)
        grad = grad.mul_(2 * ctx.alpha * grads[0].to(grad.dtype))
        return grad.to(ctx.dtype), None, None, None, None


def _whole_small_side(z: Tensor, layout: Layout, m: int, d: int, primal: bool) -> Tensor:
    """Own samples with all features (m/dp, d) for the primal, own features of all samples (m, d/tp)."""
    if primal:
        return layout.features.gather(z, d, dim=1)
    return layout.samples.gather(z, m, dim=0)


def _gram(z: Tensor, whole: Tensor, layout: Layout, m: int, d: int, primal: bool) -> Tensor:
    """ZᵀZ (d, d) or ZZᵀ (m, m): a block of rows each, summed over one axis, joined over the other."""
    if primal:
        rows = layout.samples.sum(z.T @ whole)  # (d/tp, d)
        return layout.features.gather(rows, d, dim=0)
    rows = layout.features.sum(z @ whole.T)  # (m/dp, m)
    return layout.samples.gather(rows, m, dim=0)


def _loses_digits(gram: Tensor, alpha: float) -> bool:
    """Whether rounding an fp32 Gram matrix may disturb I + αG by more than the tolerance.

    λ_max is bounded by ‖G‖_F, and where that is not enough by ‖G²‖_F^½, both far tighter than the
    trace.
    """
    gram = gram.double()
    limit = _TOLERANCE / (_FP32_EPS * alpha)
    if float(torch.linalg.matrix_norm(gram)) <= limit:
        return False
    return not float(torch.linalg.matrix_norm(gram @ gram)) <= limit**2


def _slice(indices: range) -> slice:
    return slice(indices.start, indices.stop)
