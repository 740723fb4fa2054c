"""A plan for people, and for programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from dense2conv.data.config import SETS
from dense2conv.parallel import ParallelConfig
from dense2conv.planner.cost import crosses_nodes
from dense2conv.planner.plan import Estimate, Plan, Stage

_LABEL = 22


def table(plan: Plan) -> str:
    """The best mesh in figures, the runners-up and why they lose, and what was refused."""
    best = plan.best
    lines = [
        f"{_network(plan)} on {_cluster(plan)}",
        f"{plan.config.mesh} mesh {best.mesh.name}: parallel.pp={best.mesh.pp} parallel.dp={best.mesh.dp} "
        f"parallel.tp={best.mesh.tp}",
        "",
        *_memory(best),
        "",
        *_time(best),
        "",
        *_traffic(best),
        "",
        *_loader(best),
    ]
    runners_up = plan.ranking[1 : 1 + plan.config.runners_up]
    if runners_up:
        lines += ["", "runners-up"]
        lines += [f"  {other.mesh.name:{_LABEL - 2}}{other.loses_to(best)}" for other in runners_up]
        hidden = len(plan.ranking) - 1 - len(runners_up)
        lines += [f"  and {hidden} slower ones"] if hidden else []
    refused = [(estimate.mesh, f"needs {estimate.shortage()}") for estimate in plan.too_large]
    refused += plan.impossible
    if refused:
        lines += ["", "refused"]
        lines += [f"  {mesh.name:{_LABEL - 2}}{reason}" for mesh, reason in refused]
    return "\n".join(lines)


def as_json(plan: Plan) -> str:
    """The same figures in full: bytes, operations and seconds, of every stage of every mesh."""
    best, config = plan.best, plan.config
    return json.dumps(
        {
            "cluster": asdict(config.cluster),
            "nodes": config.nodes,
            "best": _estimate(best),
            "runners_up": [
                {**_estimate(other), "loses": other.loses_to(best)} for other in plan.ranking[1:]
            ],
            "too_large": [
                {**_estimate(other), "needs": other.shortage()} for other in plan.too_large
            ],
            "impossible": [{**_sizes(mesh), "reason": reason} for mesh, reason in plan.impossible],
        },
        indent=2,
    )


def _network(plan: Plan) -> str:
    config = plan.config
    widths = [config.data.shape.numel, *config.model.widths]
    num_weights = sum(a * b for a, b in pairwise(widths))
    shape = "→".join(str(width) for width in widths)
    return f"{shape}, {_count(num_weights)} weights, batch {config.train.batch}"


def _cluster(plan: Plan) -> str:
    cluster, nodes = plan.config.cluster, plan.config.nodes
    return f"{nodes} × {cluster.name} ({nodes * cluster.devices} devices)"


def _memory(estimate: Estimate) -> list[str]:
    held, cluster = estimate.fullest.memory, estimate.config.cluster
    parts = {name: size for name, size in asdict(held).items() if size and name != "checkpoint"}
    rows = [f"  {name:{_LABEL - 2}}{_gb(size)}" for name, size in parts.items()]
    where = "" if cluster.devices_use_host_memory else "in host memory, "
    return [
        f"{'memory of a device':{_LABEL}}{_gb(estimate.peak_bytes)} of {cluster.memory_gb:g} GB",
        *rows,
        f"  {'checkpoint':{_LABEL - 2}}{_gb(held.checkpoint)} {where}while it is written",
    ]


def _time(estimate: Estimate) -> list[str]:
    slowest = estimate.slowest
    products = slowest.flops["layers"]
    rows = [
        f"  {name:{_LABEL - 2}}{1e3 * value:9.3g} ms"
        for name, value in slowest.seconds.items()
        if value
    ]
    return [
        f"{'a step':{_LABEL}}{1e3 * estimate.step_seconds:9.3g} ms, pipeline bubble {estimate.bubble:.0%}",
        *rows,
        f"{'products of layers':{_LABEL}}{products / 1e12:9.3g} TFLOP a device and step, "
        f"{products / estimate.step_seconds / 1e12:.3g} TFLOP/s reached",
    ]


def _traffic(estimate: Estimate) -> list[str]:
    stage = estimate.slowest
    lines = ["sent by a device in a step"]
    for axis, size in stage.sent_bytes.items():
        if size:
            link = "between nodes" if crosses_nodes(stage.share, axis) else "inside a node"
            calls = sum(call.count for call in stage.collectives if call.axis == axis)
            lines.append(f"  {axis:{_LABEL - 2}}{_gb(size)} in {calls} calls, {link}")
    return lines if len(lines) > 1 else ["nothing is sent"]


def _loader(estimate: Estimate) -> list[str]:
    config = estimate.config
    pixels = estimate.images_per_second * config.data.shape.numel
    lines = [
        f"{'images':{_LABEL}}{estimate.images_per_second:9.4g} a second, {_gb(pixels)} of pixels"
    ]
    if config.data.kind in SETS:  # all others are in memory before the first step
        needed, there = estimate.loader_cores, config.cluster.cores
        short = "" if needed <= there else "; too few: decode once, with data.cache=FOLDER"
        what = "to decode JPEG"
        lines.append(
            f"  {what:{_LABEL - 2}}{needed:9.3g} cores of a node, which has {there}{short}"
        )
    return lines


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {
        **_sizes(estimate.mesh),
        "step_seconds": estimate.step_seconds,
        "bubble": estimate.bubble,
        "images_per_second": estimate.images_per_second,
        "loader_cores": estimate.loader_cores,
        "peak_bytes": estimate.peak_bytes,
        "stages": [_stage(stage) for stage in estimate.stages],
    }


def _stage(stage: Stage) -> dict[str, Any]:
    return {
        "layers": [layer.index for layer in stage.share.layers],
        "memory": asdict(stage.memory),
        "flops": stage.flops,
        "seconds": stage.seconds,
        "sent_bytes": stage.sent_bytes,
        "collectives": [asdict(call) for call in stage.collectives],
    }


def _sizes(mesh: ParallelConfig) -> dict[str, int]:
    return {"pp": mesh.pp, "dp": mesh.dp, "tp": mesh.tp, "microbatches": mesh.microbatches}


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:9.3g} GB"


def _count(number: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
