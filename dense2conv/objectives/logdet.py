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
from dense2conv.objectives.precision import at_least_fp32
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
        form = _Dual if terms.is_dual else _Primal
        ctx.terms = terms
        ctx.form = in_enough_digits(lambda z: form(z, terms), features)
        ctx.save_for_backward(features)
        return ctx.form.value.to(at_least_fp32(features.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (features,) = ctx.saved_tensors  # which also finds out if they were overwritten
        if torch.is_grad_enabled():  # differentiated again
            value = in_enough_digits(lambda z: _composed(z, ctx.terms), features)
            (grad,) = torch.autograd.grad(value, features, grads[0].to(value), create_graph=True)
            return grad, None
        return ctx.form.gradient(grads[0]).to(features.dtype), None


class _Dual:
    """Fewer samples than features: one m×m Gram matrix, in which the classes' are blocks."""

    def __init__(self, z: Tensor, terms: LogDetSum) -> None:
        t, samples = terms, terms.layout.samples
        self.own = samples.shard(t.m)
        self.whole = samples.gather(z, t.m, 0)  # (m, d/tp)
        gram = gram_of(z, self.whole, samples, t.layout.features)  # (m, m)
        self.value, self.matrix = _term(gram, t)
        for batch in t.batches:
            where = batch.index[:, :, None], batch.index[:, None, :]
            value, blocks = _class_terms(batch.clear_padding(gram[where]), batch, t)
            self.value += value
            # Classes share no sample, but padding all falls on one place: it adds zeros.
            self.matrix.index_put_(where, batch.clear_padding(blocks), accumulate=True)

    def gradient(self, scale: Tensor) -> Tensor:
        rows = self.matrix[self.own.start : self.own.stop]
        return (rows * scale.to(rows.dtype)) @ self.whole


class _Primal:
    """No more features than samples: d×d Gram matrices, n×n ones of classes of n < d samples."""

    def __init__(self, z: Tensor, terms: LogDetSum) -> None:
        t, samples, features = terms, terms.layout.samples, terms.layout.features
        self.own_samples, self.own_features = samples.shard(t.m), features.shard(t.d)
        self.is_spread = samples.size > 1
        self.whole = features.gather(z, t.d, 1)  # (m/dp, d)
        large = [batch for batch in t.batches if batch.index.shape[1] >= t.d]
        small = [batch for batch in t.batches if batch.index.shape[1] < t.d]
        if samples.size > 1:
            large = [batch.within(self.own_samples) for batch in large]
        moments = []
        for batch in large:
            rows = batch.rows(z).mT  # (k, d/tp, n/dp)
            all_rows = rows if features.size == 1 else batch.rows(self.whole).mT
            moments.append(gram_of(rows, all_rows, features, samples))  # (k, d, d)
        # If every sample is in one of these, ZᵀZ is their sum, and one product makes its gradient.
        self.covered = t.classes is not None and t.classes.complete and not small
        if self.covered:
            gram = torch.cat(moments).sum(0)
        else:
            gram = gram_of(z.mT, self.whole.mT, features, samples)  # (d, d)
        self.value, self.matrix = _term(gram, t)
        self.large, self.small = [], []
        for batch, grams in zip(large, moments, strict=True):
            value, matrices = _class_terms(grams, batch, t)
            self.value += value
            self.large.append((batch, matrices + self.matrix if self.covered else matrices))
        all_samples = samples.gather(z, t.m, 0) if small else z  # (m, d/tp)
        for batch in small:
            rows = batch.rows(all_samples)  # (k, n, d/tp)
            value, matrices = _class_terms(gram_of(rows, rows, Axis(), features), batch, t)
            self.value += value
            self.small.append((batch, rows, matrices))

    def gradient(self, scale: Tensor) -> Tensor:
        scale = scale.to(self.matrix.dtype)
        columns = slice(self.own_features.start, self.own_features.stop)
        if self.covered:
            grad = self.whole.new_zeros(len(self.whole), len(self.own_features))
        else:
            grad = self.whole @ (self.matrix[:, columns] * scale)  # (m/dp, d/tp)
        # Rows that are padding are zeros.
        for batch, matrices in self.large:
            rows = batch.rows(self.whole) @ (matrices[:, :, columns] * scale)
            grad.index_add_(0, batch.index.flatten(), rows.flatten(0, 1))
        for batch, rows, matrices in self.small:
            rows = ((matrices * scale) @ rows).flatten(0, 1)
            index = batch.index.flatten()
            if self.is_spread:
                here = (index >= self.own_samples.start) & (index < self.own_samples.stop)
                index, rows = index[here] - self.own_samples.start, rows[here]
            grad.index_add_(0, index, rows)
        return grad


def _term(gram: Tensor, terms: LogDetSum) -> tuple[Tensor, Tensor]:
    """Weighted log-determinant of all samples, and its share of 2M."""
    alpha = torch.tensor(terms.alpha, dtype=torch.float64, device=gram.device)
    logdet, inverse = factorise(gram, alpha, terms.name)
    return terms.weight * logdet, inverse.mul_(2 * terms.weight)


def _class_terms(grams: Tensor, batch: ClassBatch, terms: LogDetSum) -> tuple[Tensor, Tensor]:
    """Their sum over classes of Gram matrices (k, n, n), and their share of 2M."""
    logdet, inverse = factorise(grams, terms.class_alpha / batch.sizes, terms.name)
    weight = terms.class_weight * batch.sizes  # (k,)
    return (weight * logdet).sum(), inverse.mul_(2 * weight[:, None, None].to(inverse.dtype))


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
