"""The plan: figures that can be worked out by hand, what is offered, and what is refused."""

import json
import math
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dense2conv.planner import ClusterConfig, Estimate, as_json, make_plan, table
from dense2conv.planner.plan import meshes
from dense2conv.planner.rehearsal import Rehearsal, rehearsal_lines
from dense2conv.shapes import InputError
from tests.planner.plans import plan_config

CLUSTERS = sorted((Path(__file__).parents[2] / "conf" / "cluster").glob("*.yaml"))
IMAGENET224 = {
    "data.side": 224,
    "data.channels": 3,
    "model.widths": [150_528, 16_384],
    "train.batch": 4096,
}


def cluster(name: str) -> ClusterConfig:
    path = next(path for path in CLUSTERS if path.stem == name)
    loaded = OmegaConf.merge(OmegaConf.structured(ClusterConfig), OmegaConf.load(path))
    found: ClusterConfig = OmegaConf.to_object(loaded)
    return found


def plan_on(name: str, nodes: int, changes: dict[str, object]):
    return plan_config({"cluster": cluster(name), "nodes": nodes, **changes})


def estimate(pp: int, dp: int, tp: int, changes: dict[str, object]) -> Estimate:
    config = plan_config(changes)
    config.parallel.pp, config.parallel.dp, config.parallel.tp = pp, dp, tp
    return Estimate(config, config.parallel)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_every_cluster_file_is_a_cluster(path):
    found = cluster(path.stem)
    found.validate()
    assert found.name == path.stem


def test_the_laptop_is_the_default():
    assert cluster("laptop") == ClusterConfig()


@pytest.mark.parametrize(
    ("changes", "bytes_a_weight", "state"),
    [
        ({}, 4 + 4, 4),
        ({"train.dtype": "float64"}, 8 + 8, 8),
        # The copy's gradient in 16 bits, before it is added to the master's.
        ({"train.compute": "bfloat16"}, 4 + 4, 4 + 2),
        ({"train.compute": "bfloat16", "optimizer.name": "AdamW"}, 4 + 8, 4 + 2),
        ({"optimizer.name": "SGD"}, 4, 4),
        ({"optimizer.name": "SGD", "optimizer.options": {"momentum": 0.9}}, 4 + 4, 4),
    ],
)
def test_bytes_a_weight(changes, bytes_a_weight, state):
    (stage,) = estimate(1, 1, 1, {"data.side": 10, "model.widths": [70], **changes}).stages
    held = stage.memory
    assert held.weights + held.optimizer == bytes_a_weight * 7000
    assert held.gradients == state * 7000


def test_imagenet224_in_fp32_on_one_node():
    (stage,) = estimate(1, 1, 8, IMAGENET224).stages
    held = stage.memory
    assert held.weights + held.optimizer + held.gradients == 12 * 150_528 * (150_528 + 16_384) // 8


def test_the_last_processes_hold_no_more_than_the_first():
    (stage,) = estimate(1, 1, 4, {"data.side": 10, "model.widths": [9]}).stages
    assert stage.memory.weights == 4 * 3 * 100  # 3, 3, 3 and no units


def test_operations_of_all_processes_add_up():
    changes = {"data.side": 16, "model.widths": [512, 64], "train.batch": 128}
    alone, spread = (estimate(1, n, 2 * n - 1, changes) for n in (1, 2))  # 1 and 2 × 3 processes
    products = 4 * 128 * (256 * 512 + 512 * 64)
    assert alone.stages[0].flops["layers"] == products
    # 512 and 64 units over 3 processes: 171 and 22 on the first.
    assert spread.stages[0].flops["layers"] == 4 * 64 * (256 * 171 + 512 * 22)
    network = estimate(1, 1, 1, {**changes, "objective.scope": "network"})
    assert network.stages[0].flops["layers"] == products + 2 * 128 * 512 * 64


def test_operations_of_the_rate():
    m, d = 96, 256
    changes = {"data.side": 8, "model.widths": [d], "train.batch": m, "gram_dtype": "float32"}
    (stage,) = estimate(1, 1, 1, changes).stages
    # Half a product for the symmetric ZZᵀ, one for the gradient; Cholesky and inverse.
    assert stage.flops["objective float32"] == 3 * m * m * d
    assert stage.flops["objective float64"] == m**3
    (stage,) = estimate(1, 1, 1, {**changes, "gram_dtype": "float64"}).stages
    assert stage.flops["objective float32"] == m * m * d
    assert stage.flops["objective float64"] == 3 * m * m * d + 3 * m**3


def test_images_a_second_of_a_huge_layer_on_eight_fast_devices():
    fast = {"cluster.bfloat16_tflops": 1000, "cluster.float32_tflops": 1e9}
    fast |= {"cluster.float64_tflops": 1e9, "cluster.link_gb_s": 1e9, "cluster.memory_gb_s": 1e9}
    fast |= {"cluster.devices": 8, "cluster.latency_us": 1e-6, "data.input_noise_std": 0.0}
    changes = {**IMAGENET224, "model.widths": [150_528], "train.compute": "bfloat16"}
    found = estimate(1, 1, 8, {**changes, **fast}).images_per_second
    # Forward and the weights' gradient: 9.1e10 operations a sample, at 8 × 500 TFLOP/s.
    assert found == pytest.approx(8 * 500e12 / (4 * 150_528**2), rel=1e-3)


@pytest.mark.parametrize(
    ("side", "rate"), [(32, 874), (64, 804), (224, 360), (16, 874), (512, 360), (120, 581.2)]
)
def test_cores_decode_as_many_images_as_were_measured_at_their_side(side, rate):
    found = estimate(1, 1, 1, {"data.kind": "imagenet", "data.side": side})
    assert found.loader_cores == pytest.approx(found.images_per_second / rate, rel=1e-3)


def test_traffic_takes_its_time_by_the_link_it_crosses():
    changes = {"data.side": 64, "model.widths": [4096], "train.batch": 64}
    changes |= {"cluster.devices": 4, "cluster.link_gb_s": 10, "cluster.network_gb_s": 1}
    changes |= {"cluster.latency_us": 1e-9, "link_efficiency": 1.0}
    inside = estimate(1, 2, 2, changes).stages[0]
    across = estimate(1, 2, 4, changes).stages[0]
    assert inside.seconds["dp traffic"] == pytest.approx(inside.sent_bytes["dp"] / 10e9)
    assert across.seconds["dp traffic"] == pytest.approx(across.sent_bytes["dp"] / 1e9)
    assert across.seconds["tp traffic"] == pytest.approx(across.sent_bytes["tp"] / 10e9)


@pytest.mark.parametrize(
    ("scope", "pp", "microbatches", "bubble"),
    [
        ("layerwise", 4, 1, 0),
        ("network", 1, 4, 0),
        ("network", 2, 4, 1 / 5),
        ("network", 4, 4, 3 / 7),
    ],
)
def test_the_bubble(scope, pp, microbatches, bubble):
    changes = {"model.widths": [64] * 4, "objective.scope": scope}
    found = estimate(pp, 1, 1, {**changes, "parallel.microbatches": microbatches})
    assert found.bubble == pytest.approx(bubble)
    busy = max(sum(stage.seconds.values()) for stage in found.stages)
    assert found.step_seconds == pytest.approx(busy / (1 - bubble))


def test_a_pipeline_holds_every_layer_once():
    changes = {"model.widths": [64, 32, 16, 8, 4]}
    stages = estimate(3, 1, 1, changes).stages
    assert [[layer.index for layer in stage.share.layers] for stage in stages] == [
        [0, 1],
        [2, 3],
        [4],
    ]


def test_meshes_use_all_devices_and_keep_tp_in_a_node():
    config = plan_on("h100x8", 2, {"model.widths": [64, 64]})
    found = [(mesh.pp, mesh.dp, mesh.tp) for mesh in meshes(config)]
    assert len(set(found)) == len(found)
    assert {math.prod(sizes) for sizes in found} == {16}
    assert {tp for *_, tp in found} == {1, 2, 4, 8}
    assert {pp for pp, *_ in found} == {1, 2}
    config.tp_across_nodes = True
    assert {mesh.tp for mesh in meshes(config)} == {1, 2, 4, 8, 16}


def test_the_fastest_mesh_wins_and_the_others_are_told_why():
    plan = make_plan(plan_on("h200x8", 2, IMAGENET224))
    times = [other.step_seconds for other in plan.ranking]
    assert times == sorted(times)
    shown = table(plan)
    for other in plan.ranking[1:3]:
        own, best = other.slowest.seconds, plan.best.slowest.seconds
        worst = max(own, key=lambda name: own[name] - best[name])
        reason = other.loses_to(plan.best)
        assert reason.endswith(f"more for {worst}")
        assert f"{other.mesh.name} " in shown
        assert reason in shown
    for other in plan.too_large:
        assert other.peak_bytes > 0.9 * 141e9
        assert f"needs {other.shortage()}" in shown


@pytest.mark.parametrize(
    ("name", "nodes", "changes", "remedies"),
    [
        ("a100x8", 1, {**IMAGENET224, "train.batch": 16_384}, {"nodes", "train.batch"}),
        (
            "h100x8",
            8,
            {**IMAGENET224, "model.widths": [400_000]},
            {"tp_across_nodes", "parallel.shard"},
        ),
        (
            "laptop",
            1,
            {"model.widths": [8192], "data.side": 256, "train.dtype": "float64"},
            {"train.dtype"},
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(name, nodes, changes, remedies):
    config = plan_on(name, nodes, changes)
    with pytest.raises(InputError, match=f"nothing fits on {name}, nodes={nodes}") as refused:
        make_plan(config)
    words = re.split(", or ", str(refused.value).rsplit("; use ", 1)[1])
    found = dict(word.split("=") for word in words)
    assert remedies <= found.keys()
    for key, value in found.items():
        changed = {"nodes": nodes, **changes, key: {"true": True}.get(value, value)}
        if value.isdigit():
            changed[key] = int(value)
        assert make_plan(
            plan_on(name, **{"nodes": changed.pop("nodes"), "changes": changed})
        ).ranking
    if "nodes" in found and int(found["nodes"]) > 2 * nodes:
        with pytest.raises(InputError):
            make_plan(plan_on(name, int(found["nodes"]) // 2, changes))


def test_a_host_too_small_for_checkpoints_is_refused():
    config = plan_on("h200x8", 1, {**IMAGENET224, "cluster.host_memory_gb": 200})
    with pytest.raises(InputError, match=r"201 GB of a node's host memory while a checkpoint"):
        make_plan(config)


def test_a_given_mesh_is_planned_alone():
    config = plan_on("h100x8", 2, {"model.widths": [64, 64], "mesh": "given", "parallel.tp": 16})
    plan = make_plan(config)
    assert [estimate.mesh.name for estimate in plan.ranking] == ["pp1×dp1×tp16"]
    assert "given mesh pp1×dp1×tp16" in table(plan)


def test_a_given_mesh_that_does_not_fit_is_refused_with_the_fastest_that_does():
    changes = {**IMAGENET224, "data.side": 64, "mesh": "given", "parallel.dp": 8}
    changes |= {"cluster.memory_gb": 20}
    config = plan_on("h100x8", 1, changes)
    with pytest.raises(InputError, match="pp1×dp8×tp1 comes closest") as refused:
        make_plan(config)
    best = make_plan(plan_on("h100x8", 1, {**changes, "mesh": "best"})).best.mesh
    words = f"use parallel.pp={best.pp} parallel.dp={best.dp} parallel.tp={best.tp}"
    assert words in str(refused.value)
    assert "nodes=2" not in str(refused.value)


def test_a_batch_that_no_mesh_can_split():
    config = plan_on("laptop", 1, {"model.widths": [1], "train.batch": 3})
    with pytest.raises(InputError, match=r"no mesh of laptop, nodes=1 can be: .*train\.batch=3"):
        make_plan(config)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"nodes": 0}, "nodes=0"),
        ({"mesh": "good"}, "mesh='good'"),
        ({"mesh": "given", "parallel.tp": 3}, "pp1×dp1×tp3 needs 3 processes"),
        ({"runners_up": -1}, "runners_up=-1"),
        ({"train.compute": "float16"}, "train.compute='float16'"),
        ({"gram_dtype": "bfloat16"}, "gram_dtype='bfloat16'"),
        ({"efficiency": 0.0}, "efficiency=0.0"),
        ({"usable_memory": 1.5}, "usable_memory=1.5"),
        ({"normals_per_core": 0}, "normals_per_core=0"),
        ({"cluster.images_per_core": {64: 0}}, "cluster.images_per_core={64: 0}"),
        ({"cluster.images_per_core": {}}, "cluster.images_per_core={}"),
        ({"cluster.devices": 0}, "cluster.devices=0"),
        ({"cluster.link_gb_s": -1.0}, "cluster.link_gb_s=-1.0"),
        ({"parallel.microbatches": 0}, "parallel.microbatches=0"),
        ({"model.widths": []}, "model.widths"),
        ({"engine": "deepspeed"}, "engine='deepspeed'"),
    ],
)
def test_what_cannot_be_is_named(changes, named):
    with pytest.raises(InputError, match=re.escape(named)):
        make_plan(plan_config(changes))


def test_json_holds_the_plan():
    config = plan_on("h100x8", 2, {"model.widths": [4096, 1024], "data.side": 64})
    plan = make_plan(config)
    found = json.loads(as_json(plan))
    assert found["cluster"] == json.loads(json.dumps(asdict(config.cluster)))
    assert found["best"]["step_seconds"] == plan.best.step_seconds
    assert found["best"]["stages"][0]["memory"] == asdict(plan.best.stages[0].memory)
    assert len(found["runners_up"]) == len(plan.ranking) - 1
    assert {"pp", "dp", "tp", "loses"} <= found["runners_up"][0].keys()


def test_the_table_adds_up():
    config = plan_on("h200x8", 16, {**IMAGENET224, "data.kind": "imagenet"})
    plan = make_plan(config)
    lines = table(plan).splitlines()
    assert lines[0] == (
        "150528→150528→16384, 25.1 G weights, batch 4096 on 16 × h200x8 (128 devices)"
    )
    assert any(re.match(r"  to decode JPEG +\S+ cores of a node, which has 112$", x) for x in lines)
    start = next(i for i, line in enumerate(lines) if line.startswith("a step"))
    total, *parts = (
        float(re.search(r" (\S+) ms", line)[1])
        for line in lines[start : start + 7]
        if " ms" in line
    )
    assert sum(parts) == pytest.approx(total, rel=0.01)


def test_a_rehearsal_is_of_one_mesh():
    with pytest.raises(
        InputError, match="rehearse=true with mesh=best: one mesh is run; use mesh=given"
    ):
        make_plan(plan_on("h100x8", 1, {"rehearse": True}))


def test_a_rehearsal_tells_what_was_not_planned():
    calls = Counter({("all_reduce", "tp", 8): 2, ("send", "pp", 4): 1})
    planned = Counter({("all_reduce", "tp", 8): 1, ("send", "pp", 4): 1})
    first, second = Rehearsal(calls, planned, 10**9, 2 * 10**9), Rehearsal(calls, calls, 1, 1)
    assert first.differences == ["all_reduce of 8 bytes over tp: 2 instead of 1"]
    lines = rehearsal_lines([first, second])
    assert (
        "3 collectives, the plan has 2: all_reduce of 8 bytes over tp: 2 instead of 1;" in lines[1]
    )
    assert "tensors take 1 GB at most, planned 2 GB" in lines[1]
    assert "the same as planned" in lines[2]


def test_the_two_parts_of_dp_are_links_of_their_own():
    changes = {**IMAGENET224, "parallel.shard": "weights", "parallel.dp_shard": 2}
    plan = make_plan(plan_on("h200x8", 16, changes))
    stage = plan.best.slowest
    assert stage.share.mesh.axes == ("tp", "dp", "dp_shard", "dp_replicate", "pp")
    # Rows come and their gradients leave among two; each of them is summed with its like elsewhere.
    assert stage.sent_bytes["dp_shard"] > 0
    assert stage.sent_bytes["dp_replicate"] > 0
    shown = table(plan)
    assert "dp_shard traffic" in shown
    assert "dp_replicate" in shown
