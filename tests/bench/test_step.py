"""Every candidate takes the same step as one process; the benchmark runs from end to end."""

import contextlib
import io
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from dense2conv.bench.groups import Group
from dense2conv.bench.pipelining import BATCHES, LayerWiseStage
from dense2conv.bench.step import (
    Problem,
    SilentAxis,
    StepBench,
    bench_step,
    dense_step,
)
from dense2conv.bench.timing import Ratio
from dense2conv.models.dense_stack import DenseLayer
from dense2conv.objectives import coding_rate
from dense2conv.parallel import ParallelConfig, open_mesh
from dense2conv.parallel.mesh import make_mesh
from dense2conv.shapes import SINGLE, Axis, InputError, Layout
from tests.ranks import on_ranks

SIZES = [([6, 8, 4], 10), ([6, 8, 4], 3), ([6, 8], 10), ([6, 8, 4, 6], 5)]  # widths, samples
CASES = [(*sizes, epsilon_squared) for sizes in SIZES for epsilon_squared in (None, 0.5)]


def _problem(widths, m, epsilon_squared):
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(d, inputs, generator=generator).double() / inputs**0.5
        for inputs, d in pairwise(widths)
    ]
    x = torch.randn(m, widths[0], generator=generator).double()
    return Problem(widths, weights, x, epsilon_squared, learning_rate=0.1)


def _fp32(problem):
    """DeepSpeed sums no gradients in fp64."""
    return replace(problem, weights=[w.float() for w in problem.weights], x=problem.x.float())


def _updated(problem):
    """The loss and the weights after one step, term by term."""
    weights = [w.clone().requires_grad_() for w in problem.weights]
    z = problem.x
    for w in weights[:-1]:
        z = F.relu(z @ w.T)
    z = z @ weights[-1].T
    m, d = z.shape
    loss = z.square().mean()
    if problem.epsilon_squared is not None:
        alpha = 1 / (m * problem.epsilon_squared)  # ε² is a feature's, so d of them make a sample's
        loss = -0.5 * torch.logdet(torch.eye(d).double() + alpha * z.T @ z)
    loss.backward()
    return loss.detach(), [(w - problem.learning_rate * w.grad).detach() for w in weights]


def _errors_of_steps():
    from dense2conv.bench import step_rivals

    errors = {}
    with open_mesh(ParallelConfig(tp=2)) as mesh:
        for case in CASES:
            problem = _problem(*case)
            loss, weights = _updated(problem)
            rows = [w.chunk(2)[mesh.tp.rank] for w in weights]
            # Others alternate between own units and own inputs.
            alternating = [w.chunk(2, i % 2)[mesh.tp.rank] for i, w in enumerate(weights)]
            candidates = {
                "ours": (dense_step(problem, mesh.layout), rows),
                "one process": (dense_step(problem, SINGLE), weights),
                "DTensor": (step_rivals.with_dtensor(problem, mesh), alternating),
                "FairScale": (step_rivals.with_fairscale(problem, mesh), alternating),
                "DeepSpeed": (step_rivals.with_deepspeed(_fp32(problem), mesh), alternating),
            }
            for name, (candidate, expected) in candidates.items():
                found = candidate.work()
                error = max(
                    float((w - e).abs().max())
                    for w, e in zip(candidate.kept, expected, strict=True)
                )
                if name in ("ours", "one process"):
                    error = max(error, float((found - loss).abs()))
                errors[name, *map(str, case)] = error
    return errors


def test_every_package_takes_the_same_step():
    for errors in on_ranks(2, _errors_of_steps):
        assert len(errors) == 5 * len(CASES)
        most = {case: 1e-6 if case[0] == "DeepSpeed" else 1e-12 for case in errors}
        wrong = {case: error for case, error in errors.items() if not error <= most[case]}
        assert not wrong


def _errors_of_rates(shapes):
    from dense2conv.bench import step_rivals

    errors = []
    with open_mesh(ParallelConfig(tp=2)) as mesh:
        for m, d in shapes:
            whole = torch.randn(m, d, generator=torch.Generator().manual_seed(2)).double()
            whole.requires_grad_()
            expected = coding_rate(whole, 0.5)
            expected.backward()
            own = mesh.tp.shard(d)
            z = whole.detach()[:, own.start : own.stop].clone().requires_grad_()
            value = step_rivals.small_rate(step_rivals.sharded(z, mesh), 0.5)
            value.backward()
            difference = z.grad - whole.grad[:, own.start : own.stop]
            errors += [float((value - expected).detach().abs()), float(difference.abs().max())]
    return errors


def test_the_rate_through_dtensor_is_the_rate():
    for errors in on_ranks(2, _errors_of_rates, [(6, 20), (20, 6)]):
        assert max(errors) <= 1e-12


def _pipelines(width, m, microbatches):
    """Own stage's weights after ``BATCHES`` batches, layer-wise and back-propagated, and how busy."""
    from dense2conv.bench import step_rivals

    with open_mesh(ParallelConfig(tp=2)) as mesh:
        stages = make_mesh(2, 1, 1, mesh.device)
        x = torch.randn(m, width, generator=torch.Generator().manual_seed(3)).double()

        def layer():
            layer = DenseLayer(width, width, range(width), bias=False)
            layer.init(0, stages.pp.rank, 1.0)
            return layer.double()

        works = [
            LayerWiseStage(stages, layer(), x, microbatches, input_gradient=True),
            LayerWiseStage(stages, layer(), x, microbatches, input_gradient=False),
            step_rivals.BackPropagatedStage(stages, layer(), x, microbatches),
        ]
        for work in works:
            work.optimizer.param_groups[0]["lr"] = 1.0
            work()
        return [(work.layer.weight.detach(), work.clock.busy) for work in works]


def test_pipelines_train_as_one_process_does():
    width, m, microbatches = 6, 12, 4
    x = torch.randn(m, width, generator=torch.Generator().manual_seed(3)).double()

    def trained(layer_wise):
        layers = [DenseLayer(width, width, range(width), bias=False) for _ in range(2)]
        for i, layer in enumerate(layers):
            layer.init(0, i, 1.0)
            layer.double()
        for _ in range(BATCHES):
            first = layers[0](x)
            second = layers[1](F.relu(first.detach() if layer_wise else first))
            loss = second.square().mean() + (first.square().mean() if layer_wise else 0)
            weights = [layer.weight for layer in layers]
            for weight, grad in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.data -= grad
        return [layer.weight.detach() for layer in layers]

    expected = [trained(True), trained(True), trained(False)]
    for stage, found in enumerate(on_ranks(2, _pipelines, width, m, microbatches)):
        for weights, (weight, busy) in zip(expected, found, strict=True):
            assert torch.allclose(weight, weights[stage], rtol=0, atol=1e-12)
            assert 0 < busy < 1


SMALL = {
    "networks": [[12, 8, 4], [12, 8]],
    "batches": [6],
    "rates": [[6, 16]],
    "pipelines": [[8, 8]],
    "layers": [[12, 8]],
    "layer_batch": 6,
    "calibration": 64,
    "pairs": 3,
}


def _bench(root, changes, tp=2):
    config = StepBench(parallel=ParallelConfig(tp=tp), **(SMALL | changes))
    config.run.root = root
    config.validate()
    printed = io.StringIO()
    with open_mesh(config.parallel) as mesh, contextlib.redirect_stdout(printed):
        bench_step(config, mesh)
    return printed.getvalue()


def test_it_prints_tables_and_leaves_its_rows(tmp_path):
    printed, nothing = on_ranks(2, _bench, str(tmp_path), {})
    assert nothing == ""
    assert printed.startswith("2 silent processes, each with its share")
    result = json.loads((tmp_path / "bench-step/result.json").read_text())
    assert result["benchmark"] == "step"
    assert result["machine"]["processes"] == 2
    assert result["machine"]["side_by_side"]["num_pairs"] == 3
    names = {}
    for row in result["rows"]:
        names.setdefault(row["what"], []).append(row["candidate"])
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert row["ratio"]["num_pairs"] == 3
        assert row["seconds"] > 0
        assert row["peak_bytes"] > 0
        assert f"  {row['candidate']}" in printed
    network = ["ours", "DTensor", "FairScale", "DeepSpeed", "silent", "one process"]
    alone = ["ours", "DTensor", "silent", "one process"]
    stages = ["ours", "ours, no input gradient", "all forward, all backward"]
    parts = ["ours", "products alone", "objective alone", "update alone"]
    assert list(names.values()) == [network] * 4 + [alone, stages, parts]
    assert list(names) == [
        *(f"{n}, {loss} loss, batch 6" for n in ("12→8→4", "12→8") for loss in ("plain", "rate")),
        "the rate alone of 6 × 16, forward and backward",
        "pipeline 8→8→8, batch 8 in 4 pieces",
        "layer 12→8 in bfloat16, objective included, batch 6",
    ]
    assert [row["idle_slots"] for row in result["rows"][-7:-4]] == [0, 0, 0.2]
    assert all(len(row["busy"]) == 2 for row in result["rows"][-7:-4])
    assert sorted({mark["mark"].split(" /")[0] for mark in result["marks"]}) == [
        "DTensor",
        "all forward, all backward",
        "our least busy stage",
        "ours",
        "utilisation: products alone",
    ]


def test_one_process_measures_whole_layers_alone(tmp_path):
    (printed,) = on_ranks(1, _bench, str(tmp_path), {}, 1)
    assert printed.startswith("\nlayer 12→8 in bfloat16")
    ours, products, *_ = json.loads((tmp_path / "bench-step/result.json").read_text())["rows"]
    for row in (ours, products):  # forward and the weights' gradient
        assert row["tflops"] == pytest.approx(4 * 6 * 12 * 8 / row["seconds"] / 1e12, rel=1e-3)


def test_what_a_process_keeps_is_in_its_peak(tmp_path):
    """One process holds all weights and their gradients, two hold half of them."""
    changes = {"networks": [[256, 512]], "losses": ["plain"]}
    changes |= {key: [] for key in ("rates", "pipelines", "layers")}
    on_ranks(2, _bench, str(tmp_path), changes)
    rows = json.loads((tmp_path / "bench-step/result.json").read_text())["rows"]
    peak = {row["candidate"]: row["peak_bytes"] for row in rows}
    whole = 2 * 4 * 256 * 512
    assert peak["one process"] == pytest.approx(whole, rel=0.1)
    for name in ("ours", "DTensor", "FairScale", "silent"):
        assert peak[name] == pytest.approx(whole / 2, rel=0.1), name


def test_a_silent_axis_does_the_work_of_another_without_a_word():
    axis = Axis()
    axis.size, axis.rank = 2, 1
    silent = SilentAxis(axis)
    shard = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(silent.gather(shard, 5, dim=1), torch.cat([shard, shard[:, :2]], 1))
    assert torch.equal(silent.sum(shard), shard)
    problem = _problem([6, 8, 4], 10, 0.5)
    step = dense_step(problem, Layout(features=silent))
    assert [tuple(w.shape) for w in step.kept] == [(4, 6), (2, 8)]
    assert torch.isfinite(step.work())


def test_a_package_that_cannot_be_had_is_a_row_without_figures():
    ratio = Ratio(1.0, 0.9, 1.1, 15)
    rows = [
        {"candidate": "ours", "note": "", "seconds": 0.5, "ratio": ratio, "peak_bytes": 2**20},
        {"candidate": "DeepSpeed", "note": "cannot be had here: no compiler"},
    ]
    mark = {"mark": "ours / silent", "is": ratio, "bound": "at most 1.15", "met": True}
    assert str(Group("4→8", rows, [mark])).splitlines() == [
        "4→8          ms   time / ours   MiB a process",
        "  ours       500  1 [0.9, 1.1]  1.0",
        "  DeepSpeed                                    cannot be had here: no compiler",
        "  ours / silent: 1 [0.9, 1.1]; at most 1.15: met",
    ]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"parallel": ParallelConfig()}, "parallel.tp=1: .* use parallel.tp=2"),
        ({"parallel": ParallelConfig(tp=2, dp=2)}, "parallel.dp=2"),
        ({"parallel": ParallelConfig(tp=2, device="tpu")}, "'tpu'"),
        ({"networks": [[12]]}, r"networks holds \[12\]"),
        ({"networks": [[12, 7]]}, r"networks holds \[12, 7\].*multiples of parallel.tp=2"),
        ({"rates": [[3]]}, r"rates holds \[3\]"),
        ({"pipelines": [[8, 10]]}, "multiples of microbatches=4"),
        ({"pipelines": [[8, 8]], "microbatches": 1}, "at least as many of these as processes, 2"),
        ({"losses": ["plane"]}, "'plane'"),
        ({"batches": [0]}, r"batches=\[0\]"),
        ({"layers": [[8]]}, r"layers holds \[8\]"),
        ({"threads": 0}, "threads=0"),
        ({"pairs": 1}, "pairs=1; use 3 or more"),
    ],
)
def test_what_cannot_be_measured_is_named(changes, named):
    config = StepBench(**({"parallel": ParallelConfig(tp=2)} | changes))
    with pytest.raises(InputError, match=named):
        config.validate()
