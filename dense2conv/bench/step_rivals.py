"""How other packages take a step: DTensor, FairScale and DeepSpeed split layers, torch's GPipe stages.

Split layers alternate between own units and own inputs, column and row, as in Megatron-LM (Shoeybi
et al. 2019): one sum of the second layer's outputs joins the two.

m   samples     D   inputs of a layer     d   units of a layer
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
from typing import Any

import torch
from fairscale.nn import model_parallel
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from dense2conv.bench.groups import LEARNING_RATE, Candidate
from dense2conv.bench.pipelining import BATCHES, Clock
from dense2conv.bench.step import Problem, Step
from dense2conv.models.dense_stack import DenseLayer
from dense2conv.parallel import Mesh


def small_rate(z: Tensor, epsilon_squared: float) -> Tensor:
    """R(Z) of whole features (m, d), or of a DTensor, on the small side, through autograd."""
    m, d = z.shape
    gram = z @ z.mT if m < d else z.mT @ z
    if isinstance(gram, DTensor):
        gram = gram.full_tensor()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.cholesky(eye + d / (m * epsilon_squared) * gram).diagonal().log().sum()


def sharded(z: Tensor, mesh: Mesh) -> DTensor:
    """The DTensor (m, d) of which this process holds the columns ``z``."""
    return DTensor.from_local(z, mesh.device_mesh["tp"], [Shard(1)])


def with_dtensor(problem: Problem, mesh: Mesh) -> Candidate:
    """PyTorch's own ``parallelize_module``; the output stays sharded."""
    network = _sequential(problem)
    last = len(network) - 1
    output: dict[str, Any] = {"output_layouts": Shard(-1), "use_local_output": False}
    plan = {
        str(i): style(**(output if i == last else {}))
        for i, style in _alternating(network, ColwiseParallel, RowwiseParallel)
    }
    parallelize_module(network, mesh.device_mesh["tp"], plan)
    step = Step(problem, network, network.parameters(), lambda z: _loss(problem, z))
    return Candidate(step, [p.to_local() for p in network.parameters()])  # type: ignore[attr-defined]


def with_fairscale(problem: Problem, mesh: Mesh) -> Candidate:
    """FairScale's layers, made of own shards: their own init would make the whole weight first."""
    if not model_parallel.initialize.model_parallel_is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):
            model_parallel.initialize_model_parallel(mesh.tp.size)
    network = _sequential(problem)
    last = len(network) - 1
    kinds = model_parallel.ColumnParallelLinear, model_parallel.RowParallelLinear
    for i, kind in _alternating(network, *kinds):
        column = kind is model_parallel.ColumnParallelLinear
        weight = problem.weights[i // 2]
        own = weight.tensor_split(mesh.tp.size, 0 if column else 1)[mesh.tp.rank].clone()
        layer = kind.__new__(kind)
        nn.Module.__init__(layer)
        layer.weight, layer.bias = nn.Parameter(own), None
        layer.gather_output = i == last and _wants_whole(problem)
        layer.input_is_parallel = True
        network[i] = layer
    parameters = list(network.parameters())
    return Candidate(Step(problem, network, parameters, lambda z: _loss(problem, z)), parameters)


def with_deepspeed(problem: Problem, mesh: Mesh) -> Candidate:
    """DeepSpeed's AutoTP, with the plan written out; ZeRO needs a data axis, and there is none."""
    # Else it takes any GPU it sees, and says so.
    os.environ.setdefault("DS_ACCELERATOR", mesh.device.type)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    network = _sequential(problem)
    last = len(network) - 1
    layer_specs = [
        {
            "patterns": [rf".*\b{i}\.weight$"],
            "partition_type": kind,
            "gather_output": kind == "column" and i == last and _wants_whole(problem),
        }
        for i, kind in _alternating(network, "column", "row")
    ]
    config = {
        "train_micro_batch_size_per_gpu": len(problem.x),
        "gradient_clipping": 0.0,  # left out, it is 1
        "zero_optimization": {"stage": 0},
        "tensor_parallel": {
            "autotp_size": mesh.tp.size,
            "partition_config": {"use_default_specs": False, "layer_specs": layer_specs},
        },
    }
    optimizer = torch.optim.SGD(network.parameters(), problem.learning_rate)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=config)
    except RuntimeError as error:  # it compiles an operator first
        return Candidate(None, note=f"cannot be had here: {error}")

    def step() -> Tensor:
        loss = _loss(problem, engine(problem.x))
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return Candidate(step, list(engine.parameters()), "AutoTP")


def _sequential(problem: Problem) -> nn.Sequential:
    """The whole network, its layers at even places."""
    layers: list[nn.Module] = []
    for weight in problem.weights:
        with torch.device("meta"):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.clone())
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _alternating(network: nn.Sequential, first: Any, second: Any) -> list[tuple[int, Any]]:
    """(place, kind) of every layer."""
    return [(i, (first, second)[i // 2 % 2]) for i in range(0, len(network), 2)]


def _wants_whole(problem: Problem) -> bool:
    """Whether the loss needs all units on every process; a mean square can be taken of own ones."""
    return problem.epsilon_squared is not None


def _loss(problem: Problem, z: Tensor) -> Tensor:
    m, d = len(problem.x), problem.widths[-1]
    if problem.epsilon_squared is None:
        return z.square().sum() / (m * d)
    return -small_rate(z, problem.epsilon_squared * d)


class BackPropagatedStage:
    """A stage of torch's GPipe schedule: all micro-batches forward, then all backward.

    One objective at the top, whose gradient flows back. The first stage makes the gradient of its
    inputs too, so that all stages have the same products. Every call is ``BATCHES`` batches.
    """

    def __init__(self, mesh: Mesh, layer: DenseLayer, x: Tensor, microbatches: int) -> None:
        stage, num_stages = mesh.pp.rank, mesh.pp.size
        self.layer = layer
        self.is_first, self.is_last = stage == 0, stage == num_stages - 1
        self.x = x.clone().requires_grad_()
        module = layer if self.is_last else nn.Sequential(layer, nn.ReLU())
        group = mesh.device_mesh.get_group("pp")
        self.stage = _ClockedStage(module, stage, num_stages, mesh.device, group=group)
        self.schedule = ScheduleGPipe(
            self.stage, microbatches, loss_fn=lambda z, _: z.square().mean()
        )
        self.optimizer = torch.optim.SGD(layer.parameters(), LEARNING_RATE)
        self.clock = Clock()

    def __call__(self) -> None:
        for batch in range(BATCHES):
            began, self.stage.seconds = time.perf_counter(), 0.0
            inputs = (self.x,) if self.is_first else ()
            target = self.x if self.is_last else None  # of the loss, which needs none
            self.schedule.step(*inputs, target=target, return_outputs=False)
            updated = time.perf_counter()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.x.grad = None
            now = time.perf_counter()
            if batch > 0:
                self.clock.wall += now - began
                self.clock.idle += updated - began - self.stage.seconds


class _ClockedStage(PipelineStage):
    """Counts the seconds in which it computes."""

    seconds = 0.0

    def forward_one_chunk(self, *arguments: Any, **options: Any) -> Any:
        return self._clocked(super().forward_one_chunk, *arguments, **options)

    def backward_one_chunk(self, *arguments: Any, **options: Any) -> Any:
        return self._clocked(super().backward_one_chunk, *arguments, **options)

    def _clocked(self, work: Any, *arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = work(*arguments, **options)
        self.seconds += time.perf_counter() - began
        return result
