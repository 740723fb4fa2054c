"""Planned collectives against those of the real code, on a fake process group of 1,024 ranks."""

from collections import Counter

import pytest
import torch

from dense2conv.planner import Estimate
from dense2conv.planner.share import Share
from dense2conv.planner.traffic import Collective, step_collectives
from tests.fakes import Calls, fake_group
from tests.planner.plans import plan_config
from tests.ranks import on_ranks

IMAGES = {"data.kind": "noise", "data.side": 224, "data.channels": 3, "train.batch": 4096}
WIDE = {**IMAGES, "model.widths": [150_528, 1024, 500]}
SHARDED = {"parallel.shard": "weights", "train.compute": "bfloat16", "model.bias": True}
CASES = [  # (pp, dp, tp), the rank whose calls are counted, and what else differs
    ((1, 1, 1024), 0, {"model.widths": [150_528]}),
    ((1, 1, 8), 0, {}),
    ((1, 128, 8), 0, {}),
    ((1, 1024, 1), 0, {}),
    ((2, 64, 8), 0, {"parallel.microbatches": 2, "model.bias": True}),
    ((2, 64, 8), 512, {"parallel.microbatches": 2}),
    ((1, 128, 8), 0, {"objective.scope": "network", "parallel.microbatches": 4}),
    ((2, 64, 8), 0, {"objective.scope": "network", "parallel.microbatches": 2}),
    ((2, 64, 8), 512, {"objective.scope": "network", "parallel.microbatches": 2}),
    ((1, 128, 8), 0, {"objective.batch_scope": "local", "train.dtype": "float64"}),
    ((1, 128, 8), 0, {"objective.on": "post", "model.standardise": False}),
    ((1, 128, 8), 0, SHARDED),
    ((2, 64, 8), 0, SHARDED | {"objective.scope": "network", "parallel.microbatches": 2}),
    ((2, 64, 8), 512, SHARDED | {"objective.scope": "network", "parallel.microbatches": 2}),
    ((1, 128, 8), 0, {"objective.noise_correction": True, "data.side": 16}),
]


def _planned_calls(share: Share) -> Calls:
    calls: Calls = Counter()
    for call in step_collectives(share):
        calls[call.kind, call.axis, call.num_bytes] += call.count
    return calls


def _config(sizes, changes):
    config = plan_config(WIDE | changes)
    config.parallel.pp, config.parallel.dp, config.parallel.tp = sizes
    return config


def _real_calls(sizes, rank, changes) -> Calls:
    """What one step of the real engine sends, and its metrics."""
    from dense2conv.data import open_source
    from dense2conv.objectives import EfficientCoding, Terms
    from dense2conv.parallel.engines import NativeEngine
    from dense2conv.training.loop import build_stack, next_batch
    from dense2conv.training.measures import layer_metrics
    from dense2conv.training.optim import make_optimizer
    from dense2conv.training.strengths import Strengths

    config = _config(sizes, changes)
    source = open_source(config.data, config.seed)
    with fake_group(sizes, rank) as group:
        mesh = group.mesh
        with group.tensors:
            stack = build_stack(config, mesh, config.data.shape.numel)
            optimizer = make_optimizer(config.optimizer, stack, config.objective.l1)
        noise = config.data.input_noise_std
        objective = EfficientCoding(config.objective, stack.activation, noise)
        batch, microbatches = config.train.batch, config.parallel.microbatches
        # It asks the mesh for its neighbours, which are real numbers.
        engine = NativeEngine(
            mesh,
            stack,
            objective,
            optimizer,
            batch,
            microbatches,
            compute=config.train.compute_dtype,
            regather=config.parallel.shard == "weights",
        )
        with group.tensors:
            rows = mesh.dp.shard(batch)
            x = next_batch(config, mesh, source, 0, rows) if mesh.pp.rank == 0 else None
            terms = engine.forward_backward(x)
            # A stage without an objective of its own has no terms.
            terms = terms or {"layer1": Terms(torch.zeros(()), torch.zeros(()))}
            layer_metrics(stack, terms, Strengths(config.objective, stack, optimizer))
        return group.calls


def _all_real_calls() -> list[Calls]:
    return [_real_calls(*case) for case in CASES]


@pytest.fixture(scope="module")
def real() -> list[Calls]:
    return on_ranks(1, _all_real_calls)[0]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_plan_of_1024_ranks_is_what_the_code_sends(real, case):
    sizes, rank, changes = CASES[case]
    config = _config(sizes, changes)
    stage = rank * sizes[0] // (sizes[0] * sizes[1] * sizes[2])
    assert _planned_calls(Share(config, config.parallel, stage)) == real[case]


def test_bytes_of_rings():
    assert Collective("", "all_gather", "tp", 800).sent_bytes(8) == 700
    assert Collective("", "all_reduce", "dp", 800, count=2).sent_bytes(8) == 2800
    assert Collective("", "send", "pp", 800, count=3).sent_bytes(2) == 2400


def test_one_process_sends_nothing():
    config = _config((1, 1, 1), {})
    (stage,) = Estimate(config, config.parallel).stages
    assert stage.collectives == []
