"""Rows of a layer spread over dp, and products in bfloat16: what is held, and when it is let go.

That the weights are those of one process is in test_mesh_parity.
"""

from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dense2conv.parallel import ParallelConfig, open_mesh
from dense2conv.parallel.engines import NativeEngine
from dense2conv.training.loop import build_stack
from dense2conv.training.optim import make_optimizer
from tests.parallel.test_mesh_parity import small_config
from tests.ranks import on_ranks


def _engine(mesh, parallel, scope, compute):
    """An engine with its weights, those with which products are made being written down."""
    from dense2conv.objectives import EfficientCoding

    config = small_config(1, "float32", (1, 1, 1, 1))
    config.parallel, config.objective.scope = parallel, scope
    stack = build_stack(config, mesh, config.data.shape.numel).init(0)
    optimizer = make_optimizer(config.optimizer, stack, config.objective.l1)
    objective = EfficientCoding(config.objective, stack.activation)
    engine = NativeEngine(
        mesh,
        stack,
        objective,
        optimizer,
        config.train.batch,
        compute=compute,
        regather=parallel.shard == "weights",
    )
    parameters, used = engine._parameters, []

    def seen(i):
        weight, bias = parameters(i)
        used.append((StorageWeakRef(weight.untyped_storage()), weight.dtype, tuple(weight.shape)))
        return weight, bias

    engine._parameters = seen
    return engine, used


def _forward(parallel, scope, compute=None):
    """After the forward pass, for each layer: whether its whole rows are gone, and their shape."""
    with open_mesh(parallel) as mesh:
        engine, used = _engine(mesh, parallel, scope, compute)
        images = torch.randn(96 // parallel.dp, 36, generator=torch.Generator().manual_seed(0))
        kept = engine.forward(engine.pieces(images))
        gone = [reference.expired() for reference, *_ in used]
        del kept
        return gone, [shape for *_, shape in used]


SHAPES = [(36, 36), (17, 36), (10, 17)]


@pytest.mark.parametrize(
    ("shard", "scope", "expected"),
    [
        ("optimizer", "layerwise", [True, True, True]),  # no gradient of an input, no need for them
        ("optimizer", "network", [True, False, False]),
        ("weights", "network", [True, True, True]),
    ],
)
def test_whole_rows_are_held_while_they_are_needed(shard, scope, expected):
    for gone, shapes in on_ranks(2, _forward, ParallelConfig(dp=2, shard=shard), scope):
        assert shapes == SHAPES
        assert gone == expected


def _order():
    """What happens in a step to rows and their gradients, by the number of units of their layer."""
    log = []
    with open_mesh(ParallelConfig(dp=2, shard="optimizer")) as mesh:
        engine, _ = _engine(mesh, ParallelConfig(dp=2, shard="optimizer"), "layerwise", None)
        axis, linear = engine.rows._axis, engine.linear

        def noted(name, begin):
            def begun(*tensors):
                num_units = max(len(t) for t in tensors[:2])
                log.append(f"{name} {num_units}")
                wait = begin(*tensors)
                return lambda: (wait(), log.append(f"{name} {num_units} done"))

            return begun

        def multiplied(i, *tensors):
            log.append(f"product {SHAPES[i][0]}")
            return linear(i, *tensors)

        axis.begin_gather = noted("rows", axis.begin_gather)
        axis.begin_scatter_sum = noted("gradient", axis.begin_scatter_sum)
        engine.linear = multiplied
        engine.forward_backward(torch.randn(48, 36))
    return log


def test_rows_and_their_gradients_travel_while_other_layers_are_multiplied():
    forward = ["rows 36", "rows 17", "rows 36 done", "product 36"]
    forward += ["rows 10", "rows 17 done", "product 17", "rows 10 done", "product 10"]
    backward = ["gradient 36", "gradient 17", "gradient 36 done"]
    backward += ["gradient 10", "gradient 17 done", "gradient 10 done"]
    assert on_ranks(2, _order) == [forward + backward] * 2


def _held(parallel):
    """Bytes a weight that last from step to step, and those of the copy that products take."""
    with open_mesh(parallel) as mesh:
        engine, used = _engine(mesh, parallel, "layerwise", torch.bfloat16)
        engine.forward_backward(torch.randn(96 // parallel.dp, 36))
        engine.step(0.02)
        parameters = list(engine.stack.parameters())
        held = [*parameters, *(v for p in parameters for v in engine.optimizer.state[p].values())]
        assert all(p.grad is None for p in parameters)
        copies = sum(rows * columns * 2 for _, dtype, (rows, columns) in used)
        assert all(dtype == torch.bfloat16 for _, dtype, _ in used)
        num_weights = sum(rows * columns for rows, columns in SHAPES)
        return sum(t.nbytes for t in held) / num_weights, copies / num_weights


def test_bytes_a_weight_in_bfloat16():
    """Master, momentum and copy: 4 + 4 + 2, and a row's metric; Adam's two moments would make 14."""
    ((lasting, copy),) = on_ranks(1, _held, ParallelConfig())
    assert copy == 2
    assert lasting == pytest.approx(8, rel=0.02)
    for lasting, copy in on_ranks(2, _held, ParallelConfig(dp=2, shard="optimizer")):
        assert copy == 2
        assert lasting == pytest.approx(4, rel=0.06)  # 17 units are 9 and 8


def _compiled(compiled):
    """The weights of some steps of a network, in fp64."""
    config = small_config(1, "float64", (1, 1, 1, 1))
    config.model.nonlinearity = "tanh"
    with open_mesh(replace(config.parallel)) as mesh:
        from dense2conv.objectives import EfficientCoding

        stack = build_stack(config, mesh, 36).init(0)
        optimizer = make_optimizer(config.optimizer, stack, 0.03, compiled)
        objective = EfficientCoding(config.objective, stack.activation)
        engine = NativeEngine(mesh, stack, objective, optimizer, 96, compiled=compiled)
        for step in range(5):
            images = torch.randn(96, 36, generator=torch.Generator().manual_seed(step)).double()
            engine.forward_backward(images)
            engine.step(0.02)
        return [p.detach().clone() for p in stack.parameters()]


def test_compiled_and_eager_steps_are_the_same():
    (eager,), (fused,) = on_ranks(1, _compiled, False), on_ranks(1, _compiled, True)
    torch.testing.assert_close(fused, eager, rtol=1e-9, atol=1e-12)
