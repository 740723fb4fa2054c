"""What one process holds of a run: the sizes that memory, traffic and time are all made of.

m   samples of the global batch, m/dp here     D   inputs of a layer
d   units of a layer, d/tp here                M   micro-batches

Of the processes of a pipeline stage the first one (dp rank 0, tp rank 0) holds the most.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from dense2conv.models.dense_stack import layer_name
from dense2conv.objectives.weight_rows import columns_at_once
from dense2conv.parallel import ParallelConfig
from dense2conv.parallel.products import weights_travel
from dense2conv.planner.config import PlanConfig
from dense2conv.shapes import Axis
from dense2conv.training.optim import OptimizerConfig, make_optimizer

DRAWN = ("noise", "gaussian")  # kinds of images whose pixels are fp32 rather than bytes


@dataclass(frozen=True)
class Precision:
    """Bytes of one number: of products with weights and of activations, and of all that lasts."""

    name: str
    compute: int
    master: int


@dataclass(frozen=True)
class LayerShare:
    """Layer ``index``: D inputs, d units, d/tp of them made here, the rows of ``num_kept`` kept here."""

    index: int
    num_inputs: int
    num_units: int
    num_held: int
    num_kept: int

    @property
    def num_weights(self) -> int:
        return self.num_held * self.num_inputs

    @property
    def num_kept_weights(self) -> int:
        return self.num_kept * self.num_inputs


@dataclass(frozen=True)
class Rate:
    """logdet(I + αG) of an (m, d) matrix: ``num_rows`` = m/dp and ``num_held`` = d/tp of it are here.

    rows_at_once: how many of the own rows are gathered at a time, where all would be too many.
    """

    purpose: str
    num_samples: int
    num_units: int
    num_rows: int
    num_held: int
    dp: int
    tp: int
    rows_at_once: int | None = None

    @property
    def is_dual(self) -> bool:
        """Whether the m×m side is the smaller one."""
        return self.num_samples < self.num_units

    @property
    def small_side(self) -> int:
        """min(m, d): what is factorised on every process alike."""
        return min(self.num_samples, self.num_units)

    @property
    def num_gathered(self) -> int:
        """Numbers of all samples of the own features, or on the primal side of all features of the own
        samples, where that takes a gather.
        """
        if self.is_dual:
            return self.num_samples * self.num_held if self.dp > 1 else 0
        return self.blocks[0] * self.num_units if self.tp > 1 else 0

    @property
    def blocks(self) -> list[int]:
        """Own rows that are gathered at a time."""
        most = self.rows_at_once or self.num_rows
        return [min(most, self.num_rows - start) for start in range(0, self.num_rows, most)]


@dataclass(frozen=True)
class Share:
    """The first process of pipeline stage ``stage``."""

    config: PlanConfig
    mesh: ParallelConfig
    stage: int

    @cached_property
    def layers(self) -> list[LayerShare]:
        widths = list(self.config.model.widths)
        inputs = [self.config.data.shape.numel, *widths]
        held = np.array_split(np.arange(len(widths)), self.mesh.pp)[self.stage]
        dp = _axis(self.mesh.shard_size)
        return [
            LayerShare(i, inputs[i], widths[i], units, len(dp.shard(units)))
            for i, units in ((int(i), self.held(widths[i])) for i in held)
        ]

    @property
    def coded(self) -> list[LayerShare]:
        """Layers that have an objective of their own."""
        if self.config.objective.scope == "layerwise":
            return self.layers
        return self.layers[-1:] if self.is_last else []

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.mesh.pp - 1

    @property
    def batch(self) -> int:
        """The global batch, m."""
        return self.config.train.batch

    @property
    def num_rows(self) -> int:
        """Own samples, m/dp."""
        return self.batch // self.mesh.dp

    @property
    def num_microbatch_rows(self) -> int:
        """Samples of a micro-batch, m/dp/M."""
        return self.num_rows // self.mesh.microbatches

    @property
    def precision(self) -> Precision:
        train = self.config.train
        name = str(train.compute_dtype).removeprefix("torch.")
        return Precision(name, train.compute_dtype.itemsize, train.torch_dtype.itemsize)

    @property
    def has_copies(self) -> bool:
        """Whether products take a copy of the weights that lasts no longer than it is needed."""
        return self.mesh.is_sharded or self.precision.compute < self.precision.master

    @property
    def is_network(self) -> bool:
        """Whether there is one objective, at the top."""
        return self.config.objective.scope == "network"

    def exchanges(self, layer: LayerShare) -> bool:
        """Whether blocks of a layer's weights travel along tp instead of its inputs."""
        mesh = self.mesh
        if layer.index == 0 or not self.is_network or mesh.tp == 1:
            return False
        if mesh.is_sharded and mesh.shard == "weights":  # what has arrived would be held on to
            return False
        rows = self.num_microbatch_rows
        return weights_travel(rows, layer.num_inputs, layer.num_units, mesh.tp)

    @property
    def gram_bytes(self) -> list[int]:
        """Bytes of a number of each Gram matrix: fp32, and once more where that is too coarse."""
        if self.precision.master == 8:
            return [8]
        return [4, 8] if self.config.gram_dtype == "float64" else [4]

    @property
    def pixel_bytes(self) -> int:
        return 4 if self.config.data.kind in DRAWN else 1

    @property
    def num_weights(self) -> int:
        """That last here, with their optimizer state and gradient."""
        return sum(layer.num_kept_weights for layer in self.layers)

    def held(self, num_units: int) -> int:
        """The units of a layer that are held here, d/tp rounded up."""
        return len(_axis(self.mesh.tp).shard(num_units))

    def rates(self, layer: LayerShare) -> list[Rate]:
        """The log-determinants of a layer's objective."""
        objective, name, tp = self.config.objective, layer_name(layer.index), self.mesh.tp
        m, dp = self.batch, self.mesh.dp
        if objective.batch_scope == "local":
            m, dp = self.num_rows, 1
        d, held = layer.num_units, layer.num_held
        rates = [Rate(f"rate of {name}", m, d, self.num_rows, held, dp, tp)]
        if objective.noise_correction and self.config.data.input_noise_std > 0:  # of Wᵀ (D, d)
            inputs = layer.num_inputs
            columns = columns_at_once(d)
            rates.append(Rate(f"noise through {name}", inputs, d, inputs, held, 1, tp, columns))
        return rates

    @property
    def states_per_weight(self) -> int:
        """Numbers that the optimizer keeps for a weight."""
        return _states_per_weight(json.dumps(dataclasses.asdict(self.config.optimizer)))


@cache
def _states_per_weight(config: str) -> int:
    """Found by asking the optimizer of that configuration."""
    module = torch.nn.Linear(2, 2, bias=False)
    optimizer = make_optimizer(OptimizerConfig(**json.loads(config)), module, l1=0.0)
    module.weight.grad = torch.ones_like(module.weight)
    optimizer.step()
    states = optimizer.state[module.weight].values()
    return sum(torch.is_tensor(v) and v.shape == module.weight.shape for v in states)


def _axis(size: int) -> Axis:
    axis = Axis()
    axis.size = size
    return axis
