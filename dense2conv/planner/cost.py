"""What a step takes: operations, and seconds at a stated share of the cluster's published rates.

Counted as if nothing overlapped: products, traffic and the host's own work follow each other.
"""

from __future__ import annotations

import math

from dense2conv.planner.share import Share
from dense2conv.planner.traffic import Collective

_FACTOR_AND_INVERSE = 1.0  # times n³: a third by Cholesky, two by the inverse
_DIGITS_CHECK = 2.0  # times n³: G² in fp64, which tells that an fp32 Gram matrix is too coarse
_PASSES = 14  # over a weight: momentum 3, norm 1, step 3, soft threshold 5, figures for the log 2
_HALF = 0.5  # of a symmetric product that one process makes alone
_OBJECTIVE = {4: "objective float32", 8: "objective float64"}


def flops(share: Share) -> dict[str, float]:
    """Operations of a process in a step: of the layers, and of the objective in each precision."""
    counts = dict.fromkeys(("layers", *_OBJECTIVE.values()), 0.0)
    for layer in share.layers:
        # The first layer's input is the image: its gradient is never made.
        propagates = share.is_network and layer.index > 0
        counts["layers"] += 2 * share.num_rows * layer.num_weights * (3 if propagates else 2)
    for rate in (rate for layer in share.coded for rate in share.rates(layer)):
        times_small = 2.0 * rate.small_side * rate.num_rows * rate.num_held
        alone = rate.dp == 1 if rate.is_dual else rate.tp == 1
        for number in share.gram_bytes:
            counts[_OBJECTIVE[number]] += times_small * (_HALF if alone else 1.0)
        # The last Gram matrix, which had digits enough, is factorised and gives the gradient.
        counts[_OBJECTIVE[share.gram_bytes[-1]]] += times_small
        checks = len(share.gram_bytes) - 1
        counts[_OBJECTIVE[8]] += rate.small_side**3 * (_FACTOR_AND_INVERSE + checks * _DIGITS_CHECK)
    return counts


def seconds(share: Share, collectives: list[Collective]) -> dict[str, float]:
    """Seconds of a step by what they go to."""
    cluster, efficiency = share.config.cluster, share.config.efficiency
    rate = {
        name: getattr(cluster, f"{name}_tflops") * 1e12 * efficiency
        for name in ("bfloat16", "float32", "float64")
    }
    count = flops(share)
    objective = sum(count[f"objective {name}"] / rate[name] for name in ("float32", "float64"))
    updated = share.num_weights * share.precision.master
    parts = {
        "layers": count["layers"] / rate[share.precision.name],
        "objective": objective,
        "optimizer": updated * _PASSES / (cluster.memory_gb_s * 1e9 * efficiency),
        "input noise": _noise(share),
    }
    for axis in share.mesh.axes:
        parts[f"{axis} traffic"] = sum(
            _traffic(share, call) for call in collectives if call.axis == axis
        )
    return parts


def crosses_nodes(share: Share, axis: str) -> bool:
    """Whether an axis leaves the node; ranks vary fastest along tp, then dp, then pp."""
    mesh = share.mesh
    in_stage = mesh.dp * mesh.tp
    reach = {"tp": mesh.tp, "dp_shard": mesh.shard_size * mesh.tp, "pp": mesh.world_size}
    reach |= {"dp": in_stage, "dp_replicate": in_stage}
    return reach[axis] > share.config.cluster.devices


def _traffic(share: Share, call: Collective) -> float:
    cluster = share.config.cluster
    link = cluster.network_gb_s if crosses_nodes(share, call.axis) else cluster.link_gb_s
    size = getattr(share.mesh, call.axis)
    bandwidth = link * 1e9 * share.config.link_efficiency
    steps = math.ceil(math.log2(size))
    return call.sent_bytes(size) / bandwidth + call.count * steps * cluster.latency_us * 1e-6


def _noise(share: Share) -> float:
    """The processes of a tp group share out the noise of their samples, each on a core of the host."""
    if not share.is_first or share.config.data.input_noise_std == 0:
        return 0.0
    numbers = math.ceil(share.num_rows / share.mesh.tp) * share.config.data.shape.numel
    return numbers / share.config.normals_per_core
