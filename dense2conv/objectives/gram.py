"""Gram matrices of spread features, differentiable to any order.

    n   rows, spread over one axis     p   what is summed over, spread over the other

The dual Gram ZZᵀ has samples as rows and sums over features; the primal ZᵀZ is the Gram matrix of
Zᵀ. Leading dimensions are a batch: the classes of a rate reduction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dense2conv.objectives.sums import joined, own, shared
from dense2conv.shapes import Axis, Layout

_PANEL = 128  # rows of a product that are made at once


def small_gram(features: Tensor, layout: Layout, num_samples: int, num_features: int) -> Tensor:
    """The smaller of ZᵀZ (d, d) and ZZᵀ (m, m), the same on every process.

    features: (m/dp, d/tp). Both have the same eigenvalues but for zeros.
    """
    if num_features <= num_samples:
        return gram(features.mT, layout.features, layout.samples, num_features)
    return gram(features, layout.samples, layout.features, num_samples)


def gram(rows: Tensor, rows_axis: Axis, inner_axis: Axis, num_rows: int) -> Tensor:
    """AAᵀ (…, n, n), the same on every process, of A (…, n, p) of which each holds one block.

    Every process makes the products of its own rows, a sum over ``inner_axis`` and a gather over
    ``rows_axis`` join them. The gradient is made of own rows alone, with no further traffic.
    """
    return _Gram.apply(rows, rows_axis, inner_axis, num_rows)


def gram_of(rows: Tensor, whole: Tensor, rows_axis: Axis, inner_axis: Axis) -> Tensor:
    """``gram``'s value; ``whole`` (…, n, p) is ``rows`` gathered over ``rows_axis``."""
    if rows_axis.size == 1:
        return inner_axis.sum(symmetric_product(rows))
    part = inner_axis.sum(rows @ whole.mT)  # (…, n/axis, n)
    return rows_axis.gather(part, whole.shape[-2], whole.ndim - 2)


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, rows_axis: Axis, inner_axis: Axis, num_rows: int) -> Tensor:
        ctx.rows_axis, ctx.inner_axis, ctx.num_rows = rows_axis, inner_axis, num_rows
        whole = rows_axis.gather(rows, num_rows, rows.ndim - 2)
        ctx.save_for_backward(rows, whole)
        return gram_of(rows, whole, rows_axis, inner_axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows, whole = ctx.saved_tensors
        dim = rows.ndim - 2
        if torch.is_grad_enabled():  # differentiated again: the gather takes part
            whole = shared(joined(rows, ctx.rows_axis, ctx.num_rows, dim), ctx.rows_axis)
        grad = shared(grads[0] + grads[0].mT, ctx.inner_axis)
        return own(grad, ctx.rows_axis, dim) @ whole, None, None, None


def symmetric_product(rows: Tensor) -> Tensor:
    """AAᵀ (…, n, n) of A (…, n, p), the upper half copied from the lower.

    PyTorch has no symmetric rank-k product (BLAS' syrk). Panels of rows, each times the rows up to
    its own, save up to half of the multiplications with plain matrix products, on any device.
    """
    n = rows.shape[-2]
    if n <= 2 * _PANEL:
        return rows @ rows.mT
    out = rows.new_empty(*rows.shape[:-1], n)
    for start in range(0, n, _PANEL):
        stop = min(start + _PANEL, n)
        panel = out[..., start:stop, :stop]
        torch.matmul(rows[..., start:stop, :], rows[..., :stop, :].mT, out=panel)
        out[..., :start, start:stop] = panel[..., :start].mT
    return out
