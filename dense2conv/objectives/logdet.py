"""Sums of log-determinants of features and of classes of their samples, for any layout.

    L(Z) = w logdet(I + α ZᵀZ) + Σ_k w_k logdet(I + α_k Z_kᵀZ_k)

    m   samples, spread over ``layout.samples`` (dp)     d   features, over ``layout.features`` (tp)

Each term is on its small side: both sides give the same number (Sylvester), the primal factorises
d×d, the dual m×m. The gradient is known in closed form, ∂L/∂Z = 2 M Z with

    M = w α(I + αZZᵀ)⁻¹ + Σ_k w_k α_k(I + α_k Z_kZ_kᵀ)⁻¹ in the rows and columns of class k,

and is made with the value. With fewer samples than features every class' Gram matrix is a block of
ZZᵀ, so value and gradient take three products' worth of m·m·d whatever the number of classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dense2conv.objectives.classes import ClassBatch, Classes
from dense2conv.objectives.factorisation import factorise, in_enough_digits, logdets
from dense2conv.objectives.gram import gram_of, small_gram
from dense2conv.objectives.sums import global_shape, joined
from dense2conv.shapes import SINGLE, Axis, Layout


def logdet_i_plus(
    features: Tensor,
    alpha: float,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    num_features: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """logdet(I + α ZᵀZ) of the whole (m, d) matrix Z, of which every process holds one block.

    The Gram matrix is accumulated and factorised in as many digits as it takes, at least fp32.

    Args:
        features: (m/dp, d/tp), the block held here; all of Z on one process.
        alpha: a positive number.
        layout: how Z is spread.
        num_samples, num_features: m and d, where the caller knows them; otherwise they are summed.
        name: whose features these are, for error messages.

    Returns:
        A scalar, the same on every process, in the features' precision, at least fp32. Its
        gradient with respect to ``features`` is that of the one whole-batch value: 2α (I + αZZᵀ)⁻¹
        Z, own block. Differentiable to any order.

    Raises:
        ValueError: the features hold NaN or Inf.
    """
    m, d = global_shape(features, layout, num_samples, num_features)
    return logdet_sum(features, LogDetSum(m, d, layout, name, 1.0, alpha))


@dataclass(frozen=True)
class LogDetSum:
    """Which terms to sum.

    Args:
        m, d, layout, name: of the features.
        weight, alpha: w and α of all samples.
        classes: whose terms are added, if any.
        class_weight, class_alpha: a class of m_k samples has w_k = class_weight·m_k and
            α_k = class_alpha / m_k.
    """

    m: int
    d: int
    layout: Layout
    name: str
    weight: float
    alpha: float
    classes: Classes | None = None
    class_weight: float = 0.0
    class_alpha: float = 0.0

    @property
    def batches(self) -> list[ClassBatch]:
        return self.classes.batches if self.classes else []

    @property
    def is_dual(self) -> bool:
        return self.m < self.d


def logdet_sum(features: Tensor, terms: LogDetSum) -> Tensor:
    """L of ``features`` (m/dp, d/tp): a scalar, the same on every process."""
    return _LogDetSum.apply(features, terms)


class _LogDetSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, terms: LogDetSum) -> Tensor:
        work = _Work(terms, ctx.needs_input_grad[0])
        value, grad = in_enough_digits(work.dual if terms.is_dual else work.primal, features)
        ctx.terms = terms
        ctx.save_for_backward(features, grad)
        return value.to(torch.promote_types(features.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        features, grad = ctx.saved_tensors
        if torch.is_grad_enabled():  # differentiated again
            value = in_enough_digits(lambda z: _composed(z, ctx.terms), features)
            (grad,) = torch.autograd.grad(value, features, grads[0].to(value), create_graph=True)
            return grad, None
        return (grad * grads[0].to(grad.dtype)).to(features.dtype), None


class _Work:
    """Value and, if asked for, gradient of the sum, in the precision of the features given."""

    def __init__(self, terms: LogDetSum, with_gradient: bool) -> None:
        self.terms, self.with_gradient = terms, with_gradient
        self.samples, self.features = terms.layout.samples, terms.layout.features

    def dual(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Fewer samples than features: one m×m Gram matrix; the classes' are blocks of it."""
        t = self.terms
        whole = self.samples.gather(z, t.m, 0)  # (m, d/tp)
        gram = gram_of(z, whole, self.samples, self.features)  # (m, m)
        value, matrix = self._term(gram)
        for batch in t.batches:
            where = batch.index[:, :, None], batch.index[:, None, :]
            class_value, blocks = self._class_terms(batch.clear_padding(gram[where]), batch)
            value += class_value
            if self.with_gradient:
                # Classes share no sample, but padding all falls on one place: it adds zeros.
                matrix.index_put_(where, batch.clear_padding(blocks), accumulate=True)
        if not self.with_gradient:
            return value, None
        own = self.samples.shard(t.m)
        return value, matrix[own.start : own.stop] @ whole

    def primal(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """No more features than samples: d×d Gram matrices, n×n ones of classes of n < d samples."""
        t = self.terms
        whole = self.features.gather(z, t.d, 1)  # (m/dp, d)
        own = self.features.shard(t.d)
        large = [self._held(batch) for batch in t.batches if batch.index.shape[1] >= t.d]
        small = [batch for batch in t.batches if batch.index.shape[1] < t.d]
        moments = [self._class_moments(z, whole, batch) for batch in large]  # (k, d, d) each
        # If every sample is in one of these, ZᵀZ is their sum, and one product makes its gradient.
        covered = t.classes is not None and t.classes.complete and not small
        if covered:
            gram = torch.cat(moments).sum(0)
        else:
            gram = gram_of(z.mT, whole.mT, self.features, self.samples)  # (d, d)
        value, matrix = self._term(gram)
        grad = None
        if self.with_gradient:
            grad = torch.zeros_like(z) if covered else whole @ matrix[:, own.start : own.stop]
        for batch, grams in zip(large, moments, strict=True):
            class_value, matrices = self._class_terms(grams, batch)
            value += class_value
            if grad is not None:
                matrices = matrices + matrix if covered else matrices
                rows = batch.rows(whole) @ matrices[:, :, own.start : own.stop]
                grad.index_add_(0, batch.index.flatten(), rows.flatten(0, 1))  # padding adds zeros
        if small:
            all_samples = self.samples.gather(z, t.m, 0)  # (m, d/tp)
        for batch in small:
            rows = batch.rows(all_samples)  # (k, n, d/tp)
            grams = gram_of(rows, rows, Axis(), self.features)
            class_value, matrices = self._class_terms(grams, batch)
            value += class_value
            if grad is not None:
                self._add_own(grad, batch.index.flatten(), (matrices @ rows).flatten(0, 1))
        return value, grad

    def _held(self, batch: ClassBatch) -> ClassBatch:
        """The classes among own samples."""
        return batch if self.samples.size == 1 else batch.within(self.samples.shard(self.terms.m))

    def _add_own(self, grad: Tensor, index: Tensor, rows: Tensor) -> None:
        """Add those of ``rows`` to ``grad`` whose samples are held here; padding adds zeros."""
        if self.samples.size > 1:
            held = self.samples.shard(self.terms.m)
            here = (index >= held.start) & (index < held.stop)
            index, rows = index[here] - held.start, rows[here]
        grad.index_add_(0, index, rows)

    def _term(self, gram: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted log-determinant of all samples, and its share of 2M."""
        t = self.terms
        logdet, inverse = factorise(gram, gram.new_tensor(t.alpha, dtype=torch.float64), t.name)
        return t.weight * logdet, inverse.mul_(2 * t.weight)

    def _class_terms(self, grams: Tensor, batch: ClassBatch) -> tuple[Tensor, Tensor]:
        t = self.terms
        logdet, inverse = factorise(grams, t.class_alpha / batch.sizes, t.name)
        weight = t.class_weight * batch.sizes
        return (weight * logdet).sum(), inverse.mul_(2 * weight[:, None, None].to(inverse.dtype))

    def _class_moments(self, z: Tensor, whole: Tensor, batch: ClassBatch) -> Tensor:
        """Z_kᵀZ_k (k, d, d) of classes among own samples."""
        rows = batch.rows(z).mT  # (k, d/tp, n/dp)
        all_rows = rows if self.features.size == 1 else batch.rows(whole).mT
        return gram_of(rows, all_rows, self.features, self.samples)


def _composed(z: Tensor, terms: LogDetSum) -> Tensor:
    """L, term by term, of operations that autograd differentiates to any order."""
    t = terms
    z = joined(z, t.layout.samples, t.m)  # (m, d/tp)
    layout = Layout(features=t.layout.features)
    alpha = torch.tensor(t.alpha, dtype=torch.float64, device=z.device)
    value = t.weight * logdets(small_gram(z, layout, t.m, t.d), alpha, t.name)
    for batch in t.batches:
        for k, size in enumerate(batch.sizes):
            m_k = int(size)
            rows = z.index_select(0, batch.index[k, :m_k])
            logdet = logdets(small_gram(rows, layout, m_k, t.d), t.class_alpha / size, t.name)
            value = value + t.class_weight * m_k * logdet
    return value
