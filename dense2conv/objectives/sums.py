"""Sums and gathers over processes that autograd sees through, to any order.

What a tensor is used for decides its gradient (Megatron's g and f):

- :func:`total` and :func:`joined`: the sum, or all shards, go on into a computation that every
  process does alike (a loss). All of them know its gradient already, so backward sends nothing.
- :func:`shared` and :func:`own`: a tensor that is the same everywhere meets each process's own
  shard, or is cut into shards. Its gradient is put together from what each process finds.

The two in a line are each other's adjoints. A value is thus differentiated once, not once a
process: the gradient of a loss that is the same everywhere, with respect to what is held here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dense2conv.shapes import Axis, Layout


def total(tensor: Tensor, *axes: Axis) -> Tensor:
    """Sum over the processes of ``axes``, for a computation that all of them do alike."""
    for axis in axes:
        if axis.size > 1:
            tensor = _Total.apply(tensor, axis)
    return tensor


def shared(tensor: Tensor, *axes: Axis) -> Tensor:
    """A tensor that is the same on the processes of ``axes``, for use with each one's own shard."""
    for axis in axes:
        if axis.size > 1:
            tensor = _Shared.apply(tensor, axis)
    return tensor


def joined(tensor: Tensor, axis: Axis, length: int, dim: int = 0) -> Tensor:
    """All shards along ``dim``, for a computation that the processes of ``axis`` do alike."""
    return tensor if axis.size == 1 else _Joined.apply(tensor, axis, length, dim)


def own(tensor: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Own shard of a tensor that is the same on the processes of ``axis``."""
    return tensor if axis.size == 1 else _Own.apply(tensor, axis, dim)


def mean_over_samples(values: Tensor, layout: Layout, num_samples: int) -> Tensor:
    """Whole-batch means (d/tp,) of own values (m/dp, d/tp), for a computation all do alike."""
    return total(values.sum(0), layout.samples) / num_samples


def centred(values: Tensor, layout: Layout, num_samples: int) -> Tensor:
    """Own values (m/dp, d/tp) less each feature's whole-batch mean."""
    return values - shared(mean_over_samples(values, layout, num_samples), layout.samples)


def global_shape(
    features: Tensor,
    layout: Layout,
    num_samples: int | None = None,
    num_features: int | None = None,
) -> tuple[int, int]:
    """(m, d) of the matrix of which ``features`` is one block; summed where they are not given."""
    return (
        _length(features, 0, layout.samples, num_samples),
        _length(features, 1, layout.features, num_features),
    )


def _length(features: Tensor, dim: int, axis: Axis, given: int | None) -> int:
    if given is not None:
        return given
    if axis.size == 1:
        return features.shape[dim]
    return int(axis.sum(torch.tensor(features.shape[dim], device=features.device)))


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return axis.sum(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return shared(grads[0], ctx.axis), None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return total(grads[0], ctx.axis), None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis, length: int, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return axis.gather(tensor, length, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return own(grads[0], ctx.axis, ctx.dim), None, None, None


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim, ctx.length = axis, dim, tensor.shape[dim]
        rows = axis.shard(ctx.length)
        return tensor.narrow(dim, rows.start, len(rows))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return joined(grads[0], ctx.axis, ctx.length, ctx.dim), None, None
