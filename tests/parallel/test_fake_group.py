"""A training step and a pruning pass of a layer of 150,528 units on 1,024 ranks, none of them there.

Nothing in them may wait for a value of the device: fake tensors have none.
"""

import resource
import time
from collections import Counter

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from dense2conv.parallel import ParallelConfig
from dense2conv.parallel.rehearsal import fake_group, without_numbers
from dense2conv.planner.share import Share
from dense2conv.planner.traffic import step_collectives
from tests.planner.plans import plan_config
from tests.ranks import on_ranks

TP = 1024
WIDTH = 3 * 224 * 224
LAYER = {
    "data.kind": "noise",
    "data.side": 224,
    "data.channels": 3,
    "model.widths": [WIDTH],
    "train.batch": 4096,
    "parallel.tp": TP,
}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _step_and_prune(rank, changes):
    """Collectives of a step, those of pruning, the mask's shape, seconds, and growth of the peak."""
    from dense2conv.data import open_source
    from dense2conv.objectives import EfficientCoding
    from dense2conv.parallel.engines import NativeEngine
    from dense2conv.training.loop import build_stack, next_batch
    from dense2conv.training.measures import layer_metrics
    from dense2conv.training.optim import make_optimizer
    from dense2conv.training.prune import mask_smallest
    from dense2conv.training.strengths import Strengths

    config = plan_config(LAYER | changes)
    began, before = time.monotonic(), _peak_bytes()
    fakes = FakeTensorMode()
    with fake_group(ParallelConfig(tp=TP), rank) as (mesh, recorder):
        with without_numbers(recorder, fakes):
            stack = build_stack(config, mesh, config.data.shape.numel)
            optimizer = make_optimizer(config.optimizer, stack, config.objective.l1)
        objective = EfficientCoding(config.objective, stack.activation)
        engine = NativeEngine(mesh, stack, objective, optimizer, config.train.batch)
        source = open_source(config.data, config.seed)
        with without_numbers(recorder, fakes):
            x = next_batch(config, mesh, source, 0, range(config.train.batch))
            terms = engine.forward_backward(x)
            engine.step(config.optimizer.lr)
            layer_metrics(stack, terms, Strengths(config.objective, stack, optimizer))
            step = Counter(recorder.calls)
            mask_smallest(config.prune, [stack.layer(0)], mesh.tp)
            engine.apply_masks()
        mask = stack.layer(0).mask
        pruning = recorder.calls - step
    return step, pruning, tuple(mask.shape), time.monotonic() - began, _peak_bytes() - before


@pytest.mark.parametrize(("rank", "changes"), [(0, {}), (TP - 1, {"train.dtype": "float64"})])
def test_a_step_and_a_pruning_pass_of_1024_ranks(rank, changes):
    step, pruning, mask, seconds, grown = on_ranks(1, _step_and_prune, rank, changes)[0]
    print(f"{seconds:.1f} s, {grown / 1e6:.0f} MB")
    config = plan_config(LAYER | changes)
    planned = Counter()
    for call in step_collectives(Share(config, config.parallel, 0)):
        planned[call.kind, call.axis, call.num_bytes] += call.count
    assert step == planned
    # Four histograms, and how many ties each rank holds.
    buckets = 2**16 if changes else 2**8
    assert pruning == {("all_reduce", "tp", 8 * buckets): 4, ("all_reduce", "tp", 8 * TP): 1}
    assert mask == (WIDTH // TP, WIDTH)
    assert seconds < 60
    assert grown < 4 * 2**30
