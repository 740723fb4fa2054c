"""Planned collectives against those of the real code, on a fake process group of 1,024 ranks.

Tensors are fake too: shapes without numbers. Whatever the code asks of a number's value is answered
here: ``factorise`` says that an fp32 Gram matrix is too coarse, as it is for that many units.
"""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import distributed_c10d

from dense2conv.planner import Estimate
from dense2conv.planner.share import Share
from dense2conv.planner.traffic import Collective, step_collectives
from tests.planner.plans import plan_config
from tests.ranks import on_ranks

IMAGES = {"data.kind": "noise", "data.side": 224, "data.channels": 3, "train.batch": 4096}
WIDE = {**IMAGES, "model.widths": [150_528, 1024, 500]}
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
    ((1, 128, 8), 0, {"objective.noise_correction": True, "data.side": 16}),
]

Calls = Counter  # of (kind, axis, bytes)


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
    from torch.distributed._tools import fake_collectives  # noqa: F401, gives them fake tensors
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from dense2conv.data import open_source
    from dense2conv.models import DenseStack
    from dense2conv.objectives import EfficientCoding, Terms, logdet
    from dense2conv.objectives.factorisation import LostDigits
    from dense2conv.parallel import collectives
    from dense2conv.parallel.engines import NativeEngine
    from dense2conv.parallel.mesh import make_mesh
    from dense2conv.training.loop import next_batch
    from dense2conv.training.metrics import layer_metrics
    from dense2conv.training.optim import make_optimizer

    def factorise(gram, alpha, name):
        if gram.dtype == torch.float32:
            raise LostDigits
        return gram.diagonal(dim1=-2, dim2=-1).sum(-1), gram.clone()

    config = _config(sizes, changes)
    pp, dp, tp = sizes
    distributed_c10d.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=pp * dp * tp
    )
    mesh = make_mesh(pp, dp, tp, torch.device("cpu"))
    axes = {
        getattr(axis, "group", None): name
        for name, axis in (("pp", mesh.pp), ("dp", mesh.dp), ("tp", mesh.tp))
    }
    calls: Calls = Counter()

    def counted(function, kind):
        def call(tensor, *arguments, **options):
            axis = axes[options["group"]] if "group" in options else "pp"
            tensors = [tensor, *(t for t in arguments if isinstance(t, torch.Tensor))]
            calls[kind, axis, max(t.numel() * t.element_size() for t in tensors)] += 1
            return function(tensor, *arguments, **options)

        return call

    fake = FakeTensorMode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logdet, "factorise", factorise)
        patch.setattr(dist, "all_reduce", counted(dist.all_reduce, "all_reduce"))
        patch.setattr(dist, "isend", counted(dist.isend, "send"))
        patch.setattr(dist, "recv", counted(dist.recv, "receive"))
        for kind in ("all_gather", "reduce_scatter"):
            patch.setattr(collectives, f"_{kind}", counted(getattr(collectives, f"_{kind}"), kind))
        source = open_source(config.data, config.seed)
        # Not loop.build_stack: a module cannot change its precision among fake tensors.
        torch.set_default_dtype(config.train.torch_dtype)
        with fake:
            layers = mesh.stage(len(config.model.widths))
            stack = DenseStack(config.data.shape.numel, config.model, mesh.layout, layers)
        torch.set_default_dtype(torch.float32)
        optimizer = make_optimizer(config.optimizer, stack, config.objective.l1)
        noise = config.data.input_noise_std
        objective = EfficientCoding(config.objective, stack.activation, noise)
        batch, microbatches = config.train.batch, config.parallel.microbatches
        # It asks the mesh for its neighbours, which are real numbers.
        engine = NativeEngine(mesh, stack, objective, optimizer, batch, microbatches)
        with fake:
            rows = mesh.dp.shard(batch)
            x = next_batch(config, mesh, source, 0, rows) if mesh.pp.rank == 0 else None
            terms = engine.forward_backward(x)
            # A stage without an objective of its own has no terms.
            terms = terms or {"layer1": Terms(torch.zeros(()), torch.zeros(()))}
            layer_metrics(mesh, stack, terms, config.objective.l1)
    dist.destroy_process_group()
    return calls


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
