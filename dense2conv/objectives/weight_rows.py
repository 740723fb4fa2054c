"""The log-determinant of weights whose rows are spread, without any process holding all of them.

    d   rows (units), spread over one axis (tp)      D   columns (inputs), d ≤ D

Features of a batch are gathered as they are: a batch is small. A weight is not, so its columns are
gathered a block at a time: W Wᵀ = Σ_b W_b W_bᵀ over blocks W_b (d, b), and so is ∂L/∂W, own rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dense2conv.objectives.factorisation import factorise, in_enough_digits
from dense2conv.objectives.precision import at_least_fp32
from dense2conv.shapes import Axis

_BLOCK = 1 << 20  # numbers of a block that is gathered: 4 MiB in fp32


def columns_at_once(num_rows: int) -> int:
    """How many columns of ``num_rows`` numbers are gathered at a time."""
    return max(1, _BLOCK // max(1, num_rows))


def logdet_i_plus_of_rows(
    weight: Tensor, alpha: float, axis: Axis, num_rows: int, name: str = "the layer"
) -> Tensor:
    """logdet(I + α WWᵀ) of W (d, D), d ≤ D, whose rows are spread over ``axis``.

    Every process holds d×d matrices and a block of columns beside its own rows.

    Args:
        weight: (d/tp, D), own rows.
        alpha: a positive number.
        axis: the processes that hold the rows.
        num_rows: d.
        name: of the layer, for error messages.

    Returns:
        A scalar, the same on every process, in the weights' precision, at least fp32. Its gradient
        is 2α (I + αWWᵀ)⁻¹ W, own rows, for which the columns are gathered once more.

    Raises:
        ValueError: the weights hold NaN or Inf.
    """
    return _LogDetOfRows.apply(weight, alpha, axis, num_rows, name)


class _LogDetOfRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, alpha: float, axis: Axis, num_rows: int, name: str
    ) -> Tensor:
        def value(like: Tensor) -> tuple[Tensor, Tensor]:
            scale = torch.tensor(alpha, dtype=torch.float64, device=weight.device)
            return factorise(_gram(weight, axis, num_rows, like.dtype), scale, name)

        # Blocks are put into that many digits one by one: a copy of the weights would be a share.
        logdet, inverse = in_enough_digits(value, weight[:0])
        own = axis.shard(num_rows)
        ctx.axis, ctx.num_rows = axis, num_rows
        ctx.save_for_backward(weight, inverse[own.start : own.stop].clone())  # (d/tp, d)
        return logdet.to(at_least_fp32(weight.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        weight, inverse = ctx.saved_tensors
        inverse = inverse * (2 * grads[0]).to(inverse.dtype)
        grad = torch.empty_like(weight)
        for columns, block in _blocks(weight, ctx.axis, ctx.num_rows, inverse.dtype):
            grad[:, columns] = (inverse @ block).to(grad.dtype)
        return grad, None, None, None, None


def _gram(weight: Tensor, axis: Axis, num_rows: int, dtype: torch.dtype) -> Tensor:
    """WWᵀ (d, d), the same on every process: own rows of it, then all of them."""
    rows = weight.new_zeros(len(weight), num_rows, dtype=dtype)  # (d/tp, d)
    for columns, block in _blocks(weight, axis, num_rows, dtype):
        rows.addmm_(weight[:, columns].to(dtype), block.mT)
    return axis.gather(rows, num_rows)


def _blocks(
    weight: Tensor, axis: Axis, num_rows: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Every block of columns, of all rows: (d, b)."""
    width = columns_at_once(num_rows)
    for start in range(0, weight.shape[1], width):
        columns = slice(start, start + width)
        yield columns, axis.gather(weight[:, columns].to(dtype), num_rows)
