"""The meshes of a cluster for a run: which is fastest, why the others lose, what would make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from dense2conv.parallel import ParallelConfig
from dense2conv.planner.config import PlanConfig
from dense2conv.planner.cost import flops, seconds
from dense2conv.planner.memory import Memory, memory
from dense2conv.planner.share import Share
from dense2conv.planner.traffic import Collective, step_collectives
from dense2conv.shapes import InputError

_MOST_NODES = 1 << 14


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: what its first process holds, sends and computes in a step."""

    share: Share

    @cached_property
    def memory(self) -> Memory:
        return memory(self.share)

    @cached_property
    def collectives(self) -> list[Collective]:
        return step_collectives(self.share)

    @cached_property
    def flops(self) -> dict[str, float]:
        return flops(self.share)

    @cached_property
    def seconds(self) -> dict[str, float]:
        return seconds(self.share, self.collectives)

    @property
    def sent_bytes(self) -> dict[str, float]:
        """Bytes this process sends in a step over each axis."""
        totals = dict.fromkeys(self.share.mesh.axes, 0.0)
        for call in self.collectives:
            totals[call.axis] += call.sent_bytes(getattr(self.share.mesh, call.axis))
        return totals


@dataclass(frozen=True)
class Estimate:
    """A run on one mesh."""

    config: PlanConfig
    mesh: ParallelConfig

    @cached_property
    def stages(self) -> list[Stage]:
        return [Stage(Share(self.config, self.mesh, i)) for i in range(self.mesh.pp)]

    @cached_property
    def fullest(self) -> Stage:
        """The stage that holds the most."""
        shared = self.config.cluster.devices_use_host_memory
        return max(self.stages, key=lambda stage: stage.memory.peak(shared))

    @cached_property
    def slowest(self) -> Stage:
        """The stage that all others wait for."""
        return max(self.stages, key=lambda stage: sum(stage.seconds.values()))

    @property
    def bubble(self) -> float:
        """Share of a step in which a stage waits for others.

        Stages that only send forward run ahead of each other and have none. With one objective at
        the top all M micro-batches go forward, then back: (pp - 1) / (M + pp - 1).
        """
        if self.config.objective.scope == "layerwise":
            return 0.0
        return (self.mesh.pp - 1) / (self.mesh.microbatches + self.mesh.pp - 1)

    @cached_property
    def step_seconds(self) -> float:
        return sum(self.slowest.seconds.values()) / (1 - self.bubble)

    @property
    def images_per_second(self) -> float:
        return self.config.train.batch / self.step_seconds

    @property
    def loader_cores(self) -> float:
        """Cores of a node of the first stage that decode images, each for its own share of a batch."""
        first_stage = self.mesh.dp * self.mesh.tp
        nodes = max(1.0, first_stage / self.config.cluster.devices)
        rate = self.config.cluster.images_per_core_at(self.config.data.side)
        return self.images_per_second / nodes / rate

    @property
    def peak_bytes(self) -> int:
        """The most that a device holds."""
        return self.fullest.memory.peak(self.config.cluster.devices_use_host_memory)

    def shortage(self) -> str | None:
        """What does not fit, in words; None if all does."""
        cluster, usable = self.config.cluster, self.config.usable_memory
        held = self.fullest.memory
        most = cluster.memory_gb * 1e9 * usable
        if self.peak_bytes > most:
            return (
                f"{self.peak_bytes / 1e9:.3g} GB on a device, of which {most / 1e9:.3g} GB can be used "
                f"(most for {held.largest()})"
            )
        host = max(stage.memory.checkpoint for stage in self.stages) * cluster.devices
        most = cluster.host_memory_gb * 1e9 * usable
        if not cluster.devices_use_host_memory and host > most:
            return (
                f"{host / 1e9:.0f} GB of a node's host memory while a checkpoint is written, of which "
                f"{most / 1e9:.0f} GB can be used"
            )
        return None

    def loses_to(self, best: Estimate) -> str:
        """What this mesh spends its extra time on."""
        own, other = self.slowest.seconds, best.slowest.seconds
        excess = {name: own[name] - other.get(name, 0.0) for name in own}
        if self.bubble > best.bubble:
            waited = self.step_seconds * self.bubble - best.step_seconds * best.bubble
            excess["pipeline bubble"] = waited
        worst = max(excess, key=lambda name: excess[name])
        return (
            f"{self.step_seconds / best.step_seconds:.2f}× the time: "
            f"{1e3 * excess[worst]:.3g} ms more for {worst}"
        )


@dataclass(frozen=True)
class Plan:
    """Meshes that fit, fastest first, those that do not, and those that this network cannot be spread
    over, with the reason.
    """

    config: PlanConfig
    ranking: list[Estimate]
    too_large: list[Estimate]
    impossible: list[tuple[ParallelConfig, str]]

    @property
    def best(self) -> Estimate:
        return self.ranking[0]


def make_plan(config: PlanConfig) -> Plan:
    """Rank the meshes that use all devices of ``config.nodes`` nodes.

    Raises:
        InputError: the configuration cannot be, or fits on no mesh; the message says what would.
    """
    config.validate()
    plan = _plan(config)
    if not plan.ranking:
        raise InputError(_refusal(config, plan))
    return plan


def meshes(config: PlanConfig) -> Iterator[ParallelConfig]:
    """Every pp × dp × tp of all devices, with a layer or more to a stage; or the given one alone.

    The processes of a tensor-parallel group are of one node, unless they may be of several.
    """
    if config.mesh == "given":
        yield dataclasses.replace(config.parallel, device="cpu")
        return
    world_size = config.nodes * config.cluster.devices
    for tp in _divisors(world_size):
        if not config.tp_across_nodes and config.cluster.devices % tp:
            continue
        for pp in _divisors(world_size // tp):
            if pp > len(config.model.widths):
                continue
            dp = world_size // tp // pp
            yield dataclasses.replace(config.parallel, tp=tp, pp=pp, dp=dp, device="cpu")


def _plan(config: PlanConfig) -> Plan:
    plan = Plan(config, [], [], [])
    for mesh in meshes(config):
        try:
            mesh.validate(list(config.model.widths), config.train.batch)
        except InputError as error:
            plan.impossible.append((mesh, str(error)))
            continue
        estimate = Estimate(config, mesh)
        (plan.too_large if estimate.shortage() else plan.ranking).append(estimate)
    plan.ranking.sort(key=lambda e: (e.step_seconds, e.peak_bytes))
    plan.too_large.sort(key=lambda e: e.peak_bytes)
    return plan


def _refusal(config: PlanConfig, plan: Plan) -> str:
    remedies = _remedies(config)
    use = f"use {', or '.join(remedies)}" if remedies else "use fewer or narrower layers"
    where = f"{config.cluster.name}, nodes={config.nodes}"
    if not plan.too_large:
        return f"no mesh of {where} can be: {plan.impossible[0][1]}; or {use}"
    closest = plan.too_large[0]
    return (
        f"nothing fits on {where}: {closest.mesh.name} comes closest and needs {closest.shortage()}; "
        f"{use}"
    )


def _remedies(config: PlanConfig) -> list[str]:
    """The smallest changes of one thing, each of which is enough."""
    found: dict[str, str] = {}
    for words, changed in (
        *_other_meshes(config),
        *_more_nodes(config),
        ("tp_across_nodes=true", dataclasses.replace(config, tp_across_nodes=True)),
        *_less_a_process(config),
        *_smaller_batches(config),
        *_shorter_numbers(config),
    ):
        key = words.split("=")[0]
        if key not in found and _plan(changed).ranking:
            found[key] = words
    return list(found.values())


def _other_meshes(config: PlanConfig) -> Iterator[tuple[str, PlanConfig]]:
    """Instead of a given mesh, the fastest that fits."""
    if config.mesh == "given" and (
        ranking := _plan(dataclasses.replace(config, mesh="best")).ranking
    ):
        mesh = ranking[0].mesh
        words = f"parallel.pp={mesh.pp} parallel.dp={mesh.dp} parallel.tp={mesh.tp}"
        yield words, dataclasses.replace(config, parallel=mesh)


def _more_nodes(config: PlanConfig) -> Iterator[tuple[str, PlanConfig]]:
    if config.mesh == "given":  # which says how many processes there are
        return
    nodes = 2 * config.nodes
    while nodes <= _MOST_NODES // config.cluster.devices:
        yield f"nodes={nodes}", dataclasses.replace(config, nodes=nodes)
        nodes *= 2


def _less_a_process(config: PlanConfig) -> Iterator[tuple[str, PlanConfig]]:
    """Rows of weights and optimizer state spread over dp, too."""
    if not config.objective.noise_correction and config.parallel.shard == "none":
        parallel = dataclasses.replace(config.parallel, shard="weights")
        yield "parallel.shard=weights", dataclasses.replace(config, parallel=parallel)


def _smaller_batches(config: PlanConfig) -> Iterator[tuple[str, PlanConfig]]:
    batch = config.train.batch // 2
    while batch:
        train = dataclasses.replace(config.train, batch=batch)
        yield f"train.batch={batch}", dataclasses.replace(config, train=train)
        batch //= 2


def _shorter_numbers(config: PlanConfig) -> Iterator[tuple[str, PlanConfig]]:
    """Precisions of fewer bytes, of those that training knows."""
    train = config.train
    for words, shorter in (
        ("train.dtype=float32", dataclasses.replace(train, dtype="float32")),
        ("train.compute=bfloat16", dataclasses.replace(train, compute="bfloat16")),
    ):
        if shorter.compute_dtype.itemsize < train.compute_dtype.itemsize:
            yield words, dataclasses.replace(config, train=shorter)


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]
