"""Rows of weights that processes along dp share out: together for a product, apart before and after.

D   inputs of a layer     d   units, d/tp of them in a product, some of these kept here

A layer's rows arrive while the layer below is multiplied, and their gradient leaves while the next one
is made.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from dense2conv.models import DenseStack
from dense2conv.parallel.collectives import GroupAxis


class SpreadRows:
    """The rows of a stage's layers.

    Args:
        stack: the layers, with the rows that are kept here.
        axis: over the processes that keep the other ones.
        compute: the precision in which rows travel, and products are made.
        regather: bring a layer's rows together once more for its backward instead of holding on to
            them.
    """

    def __init__(
        self, stack: DenseStack, axis: GroupAxis, compute: torch.dtype, regather: bool
    ) -> None:
        self._stack, self._axis, self._compute, self.regather = stack, axis, compute, regather
        self._coming: dict[int, list[Callable[[], Tensor]]] = {}  # rows, by layer
        self._leaving: dict[int, list[Callable[[], None]]] = {}  # their gradients

    def start(self) -> None:
        """A forward pass begins, with the weights as they are now."""
        self._coming.clear()

    def together(self, i: int) -> tuple[Tensor, Tensor | None]:
        """Weight (d/tp, D) and bias (d/tp,) of layer ``i``; those of the next layer are on their way."""
        coming = self._coming.pop(i, None) or self._begin(i)
        if i + 1 in self._stack.indices:
            self._coming[i + 1] = self._begin(i + 1)
        weight, *bias = (
            _Together.apply(own, arrive, partial(self._leave, i, own))
            for own, arrive in zip(self._stack.layer(i).parameters(), coming, strict=True)
        )
        return weight, bias[0] if bias else None

    def let_go(self, i: int, weight: Tensor) -> AbstractContextManager[Any]:
        """A block whose graph does not keep the whole ``weight`` where backward brings it together."""
        if not self.regather:
            return nullcontext()
        storage = StorageWeakRef(weight.untyped_storage()).cdata

        def pack(saved: Tensor) -> Any:  # the weight, or it transposed
            is_weight = StorageWeakRef(saved.untyped_storage()).cdata == storage
            return (saved.shape, saved.stride()) if is_weight else saved

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            return self._begin_rows(i, self._stack.layer(i).weight)().as_strided(*packed)

        return saved_tensors_hooks(pack, unpack)

    def finish(self) -> None:
        """Wait for all gradients; they are then those of the rows that are kept here."""
        self._finish_but(None)

    def _begin(self, i: int) -> list[Callable[[], Tensor]]:
        return [self._begin_rows(i, own) for own in self._stack.layer(i).parameters()]

    def _begin_rows(self, i: int, own: Parameter) -> Callable[[], Tensor]:
        num_held = len(self._stack.layout.features.shard(self._stack.layer(i).num_units))
        sent = own.detach().to(self._compute)
        whole = sent.new_empty(num_held, *own.shape[1:])
        arrive = self._axis.begin_gather(sent, whole, 0)

        def finish(sent: Tensor = sent) -> Tensor:  # which must outlive its sending
            arrive()
            return whole

        return finish

    def _leave(self, i: int, own: Parameter, grad: Tensor) -> None:
        """Start to sum the gradient of all rows into own ones; that of another layer arrives first."""
        shard = grad.new_empty(own.shape)
        arrive = self._axis.begin_scatter_sum(grad, shard, 0)

        def finish(grad: Tensor = grad) -> None:
            arrive()
            of_own = shard.to(own.dtype)
            own.grad = of_own if own.grad is None else own.grad.add_(of_own)

        self._finish_but(i)
        self._leaving.setdefault(i, []).append(finish)

    def _finish_but(self, layer: int | None) -> None:
        for i in [i for i in self._leaving if i != layer]:
            for finish in self._leaving.pop(i):
                finish()


class _Together(torch.autograd.Function):
    """All rows of a parameter, whose gradient takes a way of its own."""

    @staticmethod
    def forward(
        ctx: Any, own: Tensor, arrive: Callable[[], Tensor], leave: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.leave = leave
        return arrive()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ctx.leave(grads[0])
        return None, None, None
