"""The native engine: hand-sharded layers, exact whole-batch objectives, a pipeline of stages.

m   samples of the global batch     d   units, d/tp of them here     M   micro-batches

With ``parallel.shard`` the processes along dp, or along a part of it, keep a part of those d/tp rows
each, with gradient and optimizer state; the optimizer works on rows, so its step is exact on any of
them. The whole d/tp rows exist from a layer's forward until nothing needs them any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from dense2conv.models import DenseStack
from dense2conv.models.dense_stack import layer_name
from dense2conv.objectives import EfficientCoding, Terms
from dense2conv.parallel.collectives import GroupAxis
from dense2conv.parallel.engines.spread_rows import SpreadRows
from dense2conv.parallel.mesh import Mesh
from dense2conv.parallel.pipeline import Pipeline
from dense2conv.shapes import WHOLE, Axis, Layout


class NativeEngine:
    """Forward, backward and step of one process's share of the network; methods as in ``Engine``.

    Args:
        mesh: the mesh.
        stack: the layers and units that this process holds.
        objective: of every layer, or of the last one in the network scope.
        optimizer: of the stack's parameters; its step ends in the proximal step.
        batch: m, the size of the global batch.
        microbatches: pieces the batch is fed forward in. Whatever their number, the objective sees
            the whole batch once.
        clip: what the norm of the gradients is limited to, of all layers in the network scope, of
            each one otherwise; None: not at all.
        compute: the precision of the products with weights; None: that of the weights, which are
            then the master copy.
        regather: where rows are spread over dp, too, bring a layer's rows together once more for
            its backward instead of holding on to them. Only one objective at the top needs that.
        compiled: let torch.compile fuse what stands between the products.
    """

    def __init__(
        self,
        mesh: Mesh,
        stack: DenseStack,
        objective: EfficientCoding,
        optimizer: Optimizer,
        batch: int,
        microbatches: int = 1,
        clip: float | None = None,
        compute: torch.dtype | None = None,
        regather: bool = False,
        compiled: bool = False,
    ) -> None:
        self.mesh, self.stack, self.objective, self.optimizer = mesh, stack, objective, optimizer
        self.batch, self.microbatches, self.clip = batch, microbatches, clip
        self.compute = stack.dtype if compute is None else compute
        self.rows: SpreadRows | None = None
        if isinstance(mesh.dp_shard, GroupAxis):
            self.rows = SpreadRows(stack, mesh.dp_shard, self.compute, regather)
        self.emit = torch.compile(stack.emit) if compiled else stack.emit
        self.network_scope = objective.config.scope == "network"
        top = stack.num_layers - 1
        self.coded = [i for i in stack.indices if i == top or not self.network_scope]
        self.pipeline = Pipeline(mesh, microbatches)
        # batch_scope=local is another objective: the mean over dp of the rates of each share.
        self.num_rates = mesh.dp.size if objective.config.batch_scope == "local" else 1
        self.rate_layout = (
            mesh.layout if self.num_rates == 1 else Layout(samples=Axis(), features=mesh.tp)
        )

    @property
    def takes_images(self) -> bool:
        return self.pipeline.is_first

    def forward_backward(self, x: Tensor | None) -> dict[str, Terms]:
        received: list[Tensor] = []
        outputs, shown = self.forward(self._receive(received) if x is None else self.pieces(x))
        coded = {i: self._code_whole_batch(i, outputs[i]) for i in self.coded}
        summing: list[Callable[[], None]] = []
        for i, (_, slopes) in coded.items():
            self._backward(outputs[i], slopes, received)
            if not (self.network_scope or self.rows):  # they are complete, and travel meanwhile
                summing += self._begin_sums(self.stack.layer(i).parameters())
        if self.network_scope and not self.pipeline.is_last:
            self._backward(shown, map(self.pipeline.receive_gradient, shown), received)
        if self.rows is not None:
            self.rows.finish()
        if self.network_scope or self.rows:
            summing = self._begin_sums(self.stack.parameters())
        for finish in summing:
            finish()
        return {layer_name(i): terms for i, (terms, _) in coded.items()}

    def step(self, learning_rate: float) -> None:
        self._clip_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.apply_masks()

    def whole(self, with_optimizer: bool = False) -> AbstractContextManager[None]:
        return nullcontext()

    def drain(self) -> None:
        self.pipeline.drain()

    def take_seconds_waited(self) -> float | None:
        return self.pipeline.take_seconds_waited()

    def pieces(self, x: Tensor) -> Iterable[Tensor]:
        """The micro-batches, M pieces (m/dp/M, D), of own samples (m/dp, D)."""
        return x.chunk(self.microbatches)

    def forward(self, pieces: Iterable[Tensor]) -> tuple[dict[int, list[Tensor]], list[Tensor]]:
        """All pieces through the held layers and on to the next stage.

        Returns:
            The linear outputs of each held layer, M pieces (m/dp/M, d/tp), and what the last of
            them shows the next stage: the output itself where there is none.
        """
        if self.rows is not None:
            self.rows.start()
        outputs: dict[int, list[Tensor]] = {i: [] for i in self.stack.indices}
        for i in self.stack.indices:
            pieces = self._layer(i, pieces, outputs[i])
        shown = []
        for piece in pieces:
            shown.append(piece)
            if not self.pipeline.is_last:
                self.pipeline.send(piece)
        return outputs, shown

    def _layer(self, i: int, pieces: Iterable[Tensor], outputs: list[Tensor]) -> Iterator[Tensor]:
        """Layer ``i`` on pieces as they come: keeps its outputs and yields what it shows of them."""
        normaliser = self.stack.normaliser(i)
        parameters = None
        for piece in pieces:
            # Only now: the layers below have done their work, or at least begun.
            parameters = parameters or self._parameters(i)
            with self.rows.let_go(i, parameters[0]) if self.rows else nullcontext():
                outputs.append(self.linear(i, piece.to(self.compute), *parameters))
            if normaliser is None:
                yield self._show(i, outputs[-1])
        del parameters
        if normaliser is not None:  # which has to see the whole batch first
            activations = self.stack.activation(torch.cat(outputs).detach())
            normaliser.update(activations, self.batch, self.mesh.layout)
            yield from (self._show(i, z) for z in outputs)

    def linear(self, i: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output (m/dp/M, d/tp) of layer ``i``.

        x: images (m/dp/M, D), or own shard (m/dp/M, D/tp) of what the layer below shows.
        weight, bias: (d/tp, D) and (d/tp,), from ``_parameters``.
        """
        columns = WHOLE if i == 0 else self.mesh.tp
        # What has arrived of others' weights would be held on to.
        is_let_go = self.rows is not None and self.rows.regather
        num_units = None if is_let_go else self.stack.layer(i).num_units
        return columns.linear(x, weight, bias, num_units)

    def _parameters(self, i: int) -> tuple[Tensor, Tensor | None]:
        """Weight (d/tp, D) and bias (d/tp,) of layer ``i`` as products take them.

        In their precision, and with the rows that the other processes along dp keep. A gradient
        goes back into the own rows: the sum of those processes'.
        """
        if self.rows is not None:
            return self.rows.together(i)
        layer = self.stack.layer(i)
        bias = None if layer.bias is None else layer.bias.to(self.compute)
        return layer.weight.to(self.compute), bias

    def _show(self, i: int, z: Tensor) -> Tensor:
        """What layer ``i`` shows the next one: (m/dp/M, d/tp); gradients pass by scope."""
        if i == self.stack.num_layers - 1:
            return z
        return self.emit(i, z if self.network_scope else z.detach()).to(self.compute)

    def _receive(self, received: list[Tensor]) -> Iterator[Tensor]:
        """The previous stage's pieces as they come; keeps those whose gradient it is to have."""
        first = self.stack.layer(self.stack.indices[0])
        rows = len(self.mesh.dp.shard(self.batch)) // self.microbatches
        below = self.mesh.tp.shard(first.num_inputs)
        for _ in range(self.microbatches):
            shard = self.pipeline.receive((rows, len(below)), self.compute)
            if self.network_scope:
                received.append(shard.requires_grad_())
            yield shard

    def _code_whole_batch(self, i: int, outputs: list[Tensor]) -> tuple[Terms, Iterable[Tensor]]:
        """The objective of layer ``i`` once, on all pieces, and each one's slice of ∂L/∂Z.

        A rate is no mean over samples: the pieces' own rates would have other gradients.
        """
        z = torch.cat([piece.detach() for piece in outputs])  # (m/dp, d/tp)
        z = z.to(self.stack.dtype).requires_grad_()
        loss, terms = self.code(i, z)
        loss.backward()
        assert z.grad is not None
        return terms, z.grad.to(self.compute).split([len(piece) for piece in outputs])

    def code(self, i: int, z: Tensor) -> tuple[Tensor, Terms]:
        """The loss of layer ``i`` and its terms in nats a unit, for the whole batch's z (m/dp, d/tp)."""
        layer = self.stack.layer(i)
        weight: Tensor | None = None
        if self.objective.config.noise_correction:
            # A term in the weights alone is every dp rank's; one of them contributes its gradient.
            weight = layer.weight if self.mesh.dp.rank == 0 else layer.weight.detach()
        num_samples = self.batch // self.num_rates
        terms = self.objective(
            z, num_samples, layer.num_units, self.rate_layout, weight, layer_name(i)
        )
        values = torch.stack([t.detach().double() for t in terms])
        if self.num_rates > 1:
            values = self.mesh.dp.sum(values) / self.num_rates
        return terms.loss / self.num_rates, Terms(*(values / layer.num_units).unbind())

    def _backward(
        self, pieces: list[Tensor], slopes: Iterable[Tensor], received: list[Tensor]
    ) -> None:
        """Backward from M pieces, and on to the previous stage through what was received from it."""
        if self.rows and not received:  # one sum over dp, of all pieces' gradients
            torch.autograd.backward(pieces, list(slopes))
            return
        for k, (piece, slope) in enumerate(zip(pieces, slopes, strict=True)):
            piece.backward(slope)
            if received:
                gradient = received[k].grad
                assert gradient is not None
                self.pipeline.send_gradient(gradient)

    def _begin_sums(self, parameters: Iterable[Parameter]) -> list[Callable[[], None]]:
        """Every process has the gradient of the one objective for its samples: add them over dp.

        Where rows are spread over dp that was done when they were let go, but for processes that hold
        the same ones.
        """
        axis = self.mesh.dp_replicate if self.rows else self.mesh.dp

        def begin(parameter: Parameter) -> Callable[[], None]:
            assert parameter.grad is not None
            arrive = axis.begin_sum(parameter.grad)

            def finish() -> None:
                parameter.grad = arrive()

            return finish

        return [begin(parameter) for parameter in parameters if parameter.grad is not None]

    def _clip_gradients(self) -> None:
        """Limit the norm of each layer's gradient, or of all layers' together in the network scope.

        Layer-wise objectives leave the stages uncoupled, which a norm of all layers would not.
        """
        if self.clip is None:
            return
        layers = [list(self.stack.layer(i).parameters()) for i in self.stack.indices]
        for parameters in [list(chain(*layers))] if self.network_scope else layers:
            # Processes along dp hold the same gradient already, or other rows of it.
            square = self.stack.rows.sum(get_total_norm([p.grad for p in parameters]).square())  # type: ignore[misc]
            if self.network_scope:
                square = self.mesh.pp.sum(square)
            clip_grads_with_norm_(parameters, self.clip, square.sqrt())

    def apply_masks(self) -> None:
        """Zero the pruned weights again."""
        for i in self.stack.indices:
            self.stack.layer(i).apply_mask()
