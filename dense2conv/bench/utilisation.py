"""What share of the device's matrix-product rate a whole training step of one layer reaches.

The step is the engine's: products in bfloat16 over fp32 weights, the exact rate, the proximal step.
Its parts are timed by themselves beside it, to say what the rest of the time goes to.

m   samples     D   inputs of the layer     d   units, d/tp of them held here
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dense2conv.bench.groups import LEARNING_RATE, Candidate, Group, arrows, mark, measure
from dense2conv.bench.timing import Ratio
from dense2conv.models import DenseStack, ModelConfig
from dense2conv.objectives import EfficientCoding, ObjectiveConfig
from dense2conv.parallel import Mesh
from dense2conv.parallel.engines import NativeEngine
from dense2conv.training.measures import layer_flops
from dense2conv.training.optim import OptimizerConfig, make_optimizer

if TYPE_CHECKING:
    from dense2conv.bench.step import StepBench

_COMPUTE = torch.bfloat16


def layer_utilisation(config: StepBench, mesh: Mesh, num_inputs: int, num_units: int) -> Group:
    """A training step of one layer, and its parts, beside nothing but the same products."""
    m = config.layer_batch
    with mesh.device:
        stack = DenseStack(num_inputs, ModelConfig([num_units]), mesh.layout).init(config.seed)
        x = torch.randn(m, num_inputs)
    optimizer, eager = (
        make_optimizer(OptimizerConfig(), stack, l1=0.03, compiled=compiled)
        for compiled in (config.compile, False)
    )
    objective = EfficientCoding(ObjectiveConfig(), stack.activation)
    engine = NativeEngine(
        mesh, stack, objective, optimizer, m, compute=_COMPUTE, compiled=config.compile
    )
    weight = stack.layer(0).weight
    short_x, short_weight = x.to(_COMPUTE), weight.detach().to(_COMPUTE)
    z = torch.randn(m, len(weight), device=mesh.device)
    short_z = z.to(_COMPUTE)

    def step() -> None:
        engine.forward_backward(x)
        engine.step(LEARNING_RATE)

    def products() -> tuple[Tensor, Tensor]:
        return short_x @ short_weight.mT, short_z.mT @ short_x  # output, and the weights' gradient

    def rate() -> None:
        engine.code(0, z.detach().requires_grad_())[0].backward()

    def update(optimizer: Optimizer) -> None:
        weight.grad = gradient
        optimizer.step()
        weight.grad = None

    step()  # makes the optimizer's state, and a gradient's worth of memory
    gradient = torch.full_like(weight, 1e-6)
    kept = [weight, *(v for v in optimizer.state[weight].values() if isinstance(v, Tensor)), x]
    candidates = {
        "ours": Candidate(step, kept),
        "products alone": Candidate(products),
        "objective alone": Candidate(rate),
        "update alone": Candidate(partial(update, optimizer)),
    }
    if config.compile:
        candidates["update alone, not compiled"] = Candidate(partial(update, eager))
    times, rows = measure(mesh, candidates, config.pairs, config.seconds)
    flops = layer_flops([num_inputs, num_units], network_scope=False) * m / mesh.tp.size
    rows[0]["tflops"] = flops / median(times["ours"]) / 1e12
    rows[1]["tflops"] = flops / median(times["products alone"]) / 1e12
    for row in rows[:2]:
        row["note"] = f"{row['tflops']:.4g} TFLOP/s"
    reached = Ratio.of(times["products alone"], times["ours"])
    marks: list[dict[str, Any]] = [
        mark("utilisation: products alone / ours", reached, "above 0.6", reached.median > 0.6)
    ]
    what = f"layer {arrows([num_inputs, num_units])} in bfloat16, objective included, batch {m}"
    return Group(what, rows, marks)
