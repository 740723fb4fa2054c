"""The native engine: hand-sharded layers, exact whole-batch objectives, a forward-only pipeline.

m   samples of the global batch     d   units, d/tp held here     M   micro-batches
"""

from __future__ import annotations

import torch
from torch import Tensor

from dense2conv.models import DenseStack
from dense2conv.models.dense_stack import layer_name
from dense2conv.objectives import EfficientCoding, Terms, whole_batch
from dense2conv.parallel.mesh import Mesh
from dense2conv.parallel.pipeline import ForwardPipeline
from dense2conv.shapes import Axis, InputError, Layout


class NativeEngine:
    """Forward and backward of one process's share of the network.

    Args:
        mesh: the mesh.
        stack: the layers and units that this process holds.
        objective: of every layer, or of the last one in the network scope.
        batch: m, the size of the global batch.
        microbatches: pieces the batch is fed forward in. Whatever their number, the objective sees
            the whole batch once.

    Raises:
        InputError: a network-wide objective on several pipeline stages.
    """

    def __init__(
        self,
        mesh: Mesh,
        stack: DenseStack,
        objective: EfficientCoding,
        batch: int,
        microbatches: int = 1,
    ) -> None:
        self.mesh, self.stack, self.objective = mesh, stack, objective
        self.batch, self.microbatches = batch, microbatches
        self.network_scope = objective.config.scope == "network"
        if self.network_scope and mesh.pp.size > 1:
            raise InputError(
                f"objective.scope=network with parallel.pp={mesh.pp.size}: gradients do not cross "
                "pipeline stages yet; use objective.scope=layerwise, or parallel.pp=1"
            )
        self.pipeline = ForwardPipeline(mesh, microbatches)
        # batch_scope=local is another objective: the mean over dp of the rates of each share.
        self.num_rates = mesh.dp.size if objective.config.batch_scope == "local" else 1
        self.rate_layout = (
            mesh.layout if self.num_rates == 1 else Layout(samples=Axis(), features=mesh.tp)
        )

    def forward_backward(self, x: Tensor | None) -> dict[str, Terms]:
        """Fill the gradients of the held weights.

        Args:
            x: (m/dp, D), own samples of the batch; None except on the first stage.

        Returns:
            The terms of the held layers' objectives in nats a unit, by name.
        """
        indices = self.stack.indices
        outputs: dict[int, list[Tensor]] = {}  # of each layer, M tensors (m/dp/M, d/tp)
        pieces = self._receive(x)
        for i in indices:
            layer = self.stack.layer(i)
            outputs[i] = [layer(piece) for piece in pieces]
            if i < self.stack.num_layers - 1:
                shown = self._show(i, outputs[i])
                if i + 1 in indices:
                    pieces = [self.stack.join(i + 1, piece) for piece in shown]
                else:
                    for piece in shown:
                        self.pipeline.send(piece)
        coded = indices[-1:] if self.network_scope else indices
        terms = {layer_name(i): self._code(i, outputs[i]) for i in coded}
        self._sum_gradients()
        return terms

    def _receive(self, x: Tensor | None) -> list[Tensor]:
        """The input of the first held layer, M pieces (m/dp/M, D)."""
        first = self.stack.layer(self.stack.indices[0])
        if x is not None:
            return list(x.chunk(self.microbatches))
        below = self.mesh.tp.shard(first.num_inputs)
        rows = len(self.mesh.dp.shard(self.batch)) // self.microbatches
        shards = (
            self.pipeline.receive((rows, len(below)), first.weight.dtype)
            for _ in range(self.microbatches)
        )
        return [self.stack.join(self.stack.indices[0], shard) for shard in shards]

    def _show(self, i: int, outputs: list[Tensor]) -> list[Tensor]:
        """What layer ``i`` shows the next one: M pieces (m/dp/M, d/tp); gradients pass by scope."""
        if not self.network_scope:
            outputs = [z.detach() for z in outputs]
        normaliser = self.stack.normaliser(i)
        if normaliser is not None:
            activations = self.stack.activation(torch.cat(outputs).detach())
            normaliser.update(activations, self.batch, self.mesh.layout)
        return [self.stack.emit(i, z) for z in outputs]

    def _code(self, i: int, outputs: list[Tensor]) -> Terms:
        """The objective of layer ``i`` on the whole batch, and its gradient through every piece."""
        layer = self.stack.layer(i)
        # A term in the weights alone is every dp rank's; one of them contributes its gradient.
        weight = layer.weight if self.mesh.dp.rank == 0 else layer.weight.detach()
        num_samples = self.batch // self.num_rates
        with whole_batch(outputs) as z:  # (m/dp, d/tp)
            terms = self.objective(
                z, num_samples, layer.num_units, self.rate_layout, weight, layer_name(i)
            )
            (terms.loss / self.num_rates).backward()
        values = torch.stack([t.detach().double() for t in terms])
        if self.num_rates > 1:
            values = self.mesh.dp.sum(values) / self.num_rates
        return Terms(*(values / layer.num_units).unbind())

    def _sum_gradients(self) -> None:
        """Every process has the gradient of the one objective for its samples: add them over dp."""
        for parameter in self.stack.parameters():
            if parameter.grad is not None:
                parameter.grad = self.mesh.dp.sum(parameter.grad)
