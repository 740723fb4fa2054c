"""Log-determinants and inverses of I + αG by Cholesky, in as many digits as it takes.

G is a Gram matrix (…, n, n), α > 0. An fp32 Gram matrix carries a rounding error of about
6e-8 λ_max(G); what matters is how far that moves the smallest eigenvalues of I + αG, which are 1.
Where it is nothing, the factorisation is in fp32 too; where it is little, in fp64; and where it
would be more than 1e-4, the Gram matrix has to be made again, of the features in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_FP32_EPS = 6e-8  # rounding of an fp32 product, relative to λ_max
_NOTHING, _LITTLE = 2.5e-5, 1e-4  # what rounding may add to the eigenvalue 1

Value = TypeVar("Value")


class NotFinite(ValueError):
    """Features hold NaN or Inf, or are so large that fp64 cannot factorise their Gram matrix."""


class LostDigits(ArithmeticError):
    """An fp32 Gram matrix is too coarse for its α."""


def in_enough_digits(value: Callable[[Tensor], Value], features: Tensor) -> Value:
    """``value`` of the features in fp32, or in fp64 where it finds that digits are lost.

    Half precision goes up first: with 8 bits a Gram matrix has no small eigenvalues. The finding is
    about Gram matrices that all processes hold alike, so all of them take the same way.
    """
    if features.dtype == torch.float64:
        return value(features)
    features = features.float()
    try:
        return value(features)
    except LostDigits:
        pass  # the exception, and with it what the attempt has made, is let go of first
    return value(features.double())


def is_true(fact: Tensor) -> bool:
    """What a device value says, for which the host waits: all that these factorisations ask it.

    Whoever runs them on tensors without numbers replaces this by a constant no: no digits to spare,
    nothing failed.
    """
    return bool(fact)


def factorise(gram: Tensor, alpha: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The log-determinant of I + αG, (…) in fp64, and α(I + αG)⁻¹ (…, n, n), which is its gradient.

    alpha: (…) in fp64, one for each matrix.

    Raises:
        LostDigits: G is fp32, and its rounding may disturb I + αG by more than 1e-4.
        NotFinite: G holds NaN or Inf, whatever ``name`` names computed it.
    """
    scale = alpha[..., None, None]
    if gram.dtype == torch.float32 and _has_digits_to_spare(gram, alpha):
        i_plus = gram * scale.float()
    else:
        i_plus = gram.double() * scale
    i_plus.diagonal(dim1=-2, dim2=-1).add_(1)
    # In place, of the transpose, which is the same matrix in LAPACK's order: no copies are made.
    factor = i_plus.mT
    info = torch.empty(gram.shape[:-2], dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    if is_true(info.any()):
        raise NotFinite(
            f"the features of {name} hold NaN or Inf; lower the learning rate, or look at the data"
            if not bool(gram.isfinite().all())
            else f"I + αG of {name} is not positive definite: its features are too large for fp64"
        )
    logdet = 2 * factor.diagonal(dim1=-2, dim2=-1).double().log().sum(-1)
    inverse = torch.cholesky_inverse(factor).mul_(scale.to(factor.dtype))
    return logdet, inverse.to(gram.dtype)


def logdets(gram: Tensor, alpha: Tensor, name: str) -> Tensor:
    """``factorise``'s log-determinants (…) in fp64, differentiable to any order in G and α."""
    if alpha.requires_grad:  # it scales G, and the factorisation sees the product
        gram, alpha = gram.double() * alpha[..., None, None], torch.ones_like(alpha)
    return _LogDet.apply(gram, alpha, name)


class _LogDet(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gram: Tensor, alpha: Tensor, name: str) -> Tensor:
        logdet, inverse = factorise(gram, alpha, name)
        ctx.save_for_backward(gram, inverse)
        return logdet

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        gram, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            inverse = _Inverse.apply(gram, inverse)
        return grads[0][..., None, None].to(gram.dtype) * inverse, None, None


class _Inverse(torch.autograd.Function):
    """α(I + αG)⁻¹ as a function of G, its value known already."""

    @staticmethod
    def forward(ctx: Any, gram: Tensor, inverse: Tensor) -> Tensor:
        inverse = inverse.view_as(inverse)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        return -(inverse @ grads[0] @ inverse), None


def _has_digits_to_spare(gram: Tensor, alpha: Tensor) -> bool:
    """Whether rounding an fp32 Gram matrix adds nothing to an eigenvalue of I + αG, even at worst.

    λ_max is bounded by ‖G‖_F, and where that is not enough by ‖G²‖_F^½, both far tighter than the
    trace.

    Raises:
        LostDigits: it adds more than a little.
    """
    added = torch.linalg.matrix_norm(gram) * alpha * _FP32_EPS
    if is_true((added <= _NOTHING).all()):
        return True
    if not is_true((added <= _LITTLE).all()):
        gram = gram.double()
        added = torch.linalg.matrix_norm(gram @ gram).sqrt() * alpha * _FP32_EPS
        if not is_true((added <= _LITTLE).all()):
            raise LostDigits
    return False
