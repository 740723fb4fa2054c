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
from dense2conv.shapes import WHOLE, Axis, Layout

_PANEL = 128


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
        return symmetric_product(rows, inner_axis)
    if inner_axis.size == 1:
        part = rows @ whole.mT  # (…, n/axis, n)
    else:
        blocks = (rows[..., r.start : r.stop, :] for r in panels(rows.shape[-2]))
        sums = [inner_axis.begin_sum(block @ whole.mT) for block in blocks]
        part = torch.cat([finish() for finish in sums], -2)
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


def symmetric_product(rows: Tensor, inner_axis: Axis = WHOLE) -> Tensor:
    """AAᵀ (…, n, n) of A (…, n, p), summed over ``inner_axis``; the upper half copied from the lower.

    PyTorch has no symmetric rank-k product (BLAS' syrk). Panels of rows, each times the rows up to
    its own, save up to half of the multiplications with plain matrix products, on any device, and
    of the traffic: the sum of one is under way while the next is made.
    """
    n = rows.shape[-2]
    places = panels(n)
    products = (rows[..., r.start : r.stop, :] @ rows[..., : r.stop, :].mT for r in places)
    sums = [inner_axis.begin_sum(product) for product in products]
    if len(sums) == 1:
        return sums[0]()
    out = rows.new_empty(*rows.shape[:-1], n)
    for r, finish in zip(places, sums, strict=True):
        panel = finish()  # (…, panel, r.stop)
        out[..., r.start : r.stop, : r.stop] = panel
        out[..., : r.start, r.start : r.stop] = panel[..., : r.start].mT
    return out


def panels(num_rows: int) -> list[range]:
    """The rows of a product that are made, and summed over processes, at once."""
    if num_rows <= 2 * _PANEL:
        return [range(num_rows)]
    return [range(start, min(start + _PANEL, num_rows)) for start in range(0, num_rows, _PANEL)]
