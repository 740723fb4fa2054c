"""``dense2conv bench step``: a training step of sharded layers beside other packages, in time and memory.

m   samples     D   inputs of a layer     d   units of a layer, d/tp of them held here
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from dense2conv.bench.groups import (
    LEARNING_RATE,
    Candidate,
    Group,
    arrows,
    mark,
    measure,
    on_one,
    synchroniser,
)
from dense2conv.bench.pipelining import pipeline_group
from dense2conv.bench.timing import Ratio, Work, interleaved, machine, plain
from dense2conv.bench.utilisation import layer_utilisation
from dense2conv.files import write_atomically
from dense2conv.models import DenseStack, ModelConfig
from dense2conv.models.dense_stack import layer_name
from dense2conv.objectives import coding_rate
from dense2conv.objectives.sums import total
from dense2conv.parallel import Mesh, ParallelConfig
from dense2conv.rng import IMAGES, normal_rows
from dense2conv.shapes import SINGLE, Axis, InputError, Layout
from dense2conv.training.run_folder import RunConfig, RunFolder

_LOSSES = ("plain", "rate")
_SIDE_BY_SIDE = 0.8  # of the ideal speed-up: below it the processes share cores


def _run() -> RunConfig:
    return RunConfig(name="bench-step", existing="keep_aside")


@dataclass
class StepBench:
    """What ``dense2conv bench step`` measures; an empty list leaves its rows out."""

    run: RunConfig = field(default_factory=_run)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    networks: list[list[int]] = field(
        default_factory=lambda: [[3072, 4096, 1024], [12288, 8192]],
        metadata={"help": "[inputs, units, units, …] of each dense network"},
    )
    batches: list[int] = field(
        default_factory=lambda: [256, 2048], metadata={"help": "samples of a step, a row each"}
    )
    losses: list[str] = field(
        default_factory=lambda: list(_LOSSES),
        metadata={"help": "plain (mean square of the output) and rate (its coding rate)"},
    )
    rates: list[list[int]] = field(
        default_factory=lambda: [[512, 4096], [1024, 16384]],
        metadata={"help": "[samples, features] of each row of the rate alone"},
    )
    pipelines: list[list[int]] = field(
        default_factory=lambda: [[4096, 2048]],
        metadata={"help": "[units, samples] of each pipeline of equal layers, one a process"},
    )
    microbatches: int = field(default=4, metadata={"help": "pieces of a pipeline's batch"})
    layers: list[list[int]] | None = field(
        default=None,
        metadata={
            "help": "[inputs, units] of each layer whose whole step in bfloat16 is held against its "
            "products; null: two large ones on a GPU, none on a CPU"
        },
    )
    layer_batch: int = field(default=4096, metadata={"help": "samples of the steps of layers"})
    compile: bool = field(
        default=False, metadata={"help": "let torch.compile fuse the updates of layers"}
    )
    calibration: int = field(
        default=2048, metadata={"help": "side of the product that tells how many cores there are"}
    )
    pairs: int = field(default=15, metadata={"help": "rounds in which all candidates take turns"})
    seconds: float = field(
        default=600.0, metadata={"help": "a row gets fewer rounds if more would take longer"}
    )
    threads: int = field(default=1, metadata={"help": "threads of each process"})
    epsilon_squared: float = field(default=0.5, metadata={"help": "ε² a feature of the rate"})
    seed: int = field(default=0, metadata={"help": "of weights and samples"})

    @property
    def whole_layers(self) -> list[list[int]]:
        """The layers whose whole step is measured on this device."""
        if self.layers is not None:
            return self.layers
        on_gpu = self.parallel.device != "cpu" and torch.cuda.is_available()
        return [[12288, 49152], [49152, 49152]] if on_gpu else []

    def validate(self) -> None:
        """Raise InputError where a field cannot be."""
        self.run.validate()
        self.parallel.validate_device()
        tp = self.parallel.tp
        if self.parallel.dp * self.parallel.pp > 1 or (tp < 2 and not self.whole_layers):
            raise InputError(
                f"parallel.pp={self.parallel.pp} parallel.dp={self.parallel.dp} parallel.tp={tp}: "
                "this benchmark splits layers over processes; use parallel.tp=2, or measure whole "
                "layers= on one process"
            )
        for widths in self.networks:
            if len(widths) < 2 or min(widths) < 1 or any(width % tp for width in widths[1:]):
                raise InputError(
                    f"networks holds {widths}; give [inputs, units, …], units in multiples of "
                    f"parallel.tp={tp}, since others split evenly or not at all"
                )
        for name in ("rates", "pipelines", "layers"):
            for shape in getattr(self, name) or []:
                if len(shape) != 2 or min(shape) < 1:
                    raise InputError(f"{name} holds {shape}; give two positive numbers a row")
        for units, samples in self.pipelines:
            if samples % self.microbatches or self.microbatches < tp:
                raise InputError(
                    f"pipelines holds {[units, samples]}; use samples in multiples of microbatches="
                    f"{self.microbatches}, and at least as many of these as processes, {tp}"
                )
        unknown = set(self.losses) - set(_LOSSES)
        if unknown:
            raise InputError(f"losses holds {sorted(unknown)}; use some of {list(_LOSSES)}")
        if min([1, *self.batches, self.layer_batch, self.calibration, self.threads]) < 1:
            raise InputError(
                f"batches={self.batches} layer_batch={self.layer_batch} calibration="
                f"{self.calibration} threads={self.threads}; use positive numbers"
            )
        if self.pairs < 3:
            raise InputError(f"pairs={self.pairs}; use 3 or more, 15 for an interval")


def bench_step(config: StepBench, mesh: Mesh) -> None:
    """Measure group by group, print each, and keep all in ``result.json`` in the run's folder."""
    torch.set_num_threads(config.threads)
    folder = RunFolder(config.run.folder)
    if mesh.is_main:
        folder.create(config.run, resume=False)
    ratio = _calibrate(config, mesh)
    about = {}
    if mesh.is_main:
        about = machine(mesh.device) | {"processes": mesh.tp.size, "side_by_side": ratio}
        if mesh.tp.size > 1:
            print(_on_cores(ratio, mesh.tp.size), flush=True)
    groups: list[Group] = []
    for group in _groups(config, mesh):
        groups.append(group())
        gc.collect()  # the others' modules hold themselves
        if mesh.is_main:  # a long run leaves what it has, even if it is stopped
            print(f"\n{groups[-1]}", flush=True)
            _write(folder, about, groups)
    if mesh.is_main:
        print(
            f"\nforward, backward and update; {mesh.tp.size} processes, {config.threads} thread(s) "
            f"each, {about['device']}, {about['processor']}, torch {about['torch']}"
        )
        print(folder.path / "result.json")


def _groups(config: StepBench, mesh: Mesh) -> list[Callable[[], Group]]:
    networks = product(config.networks, config.batches, config.losses)
    layers: list[Callable[[], Group]]
    layers = [partial(layer_utilisation, config, mesh, *shape) for shape in config.whole_layers]
    if mesh.tp.size == 1:
        return layers  # the rest is about several processes
    return [
        *(partial(_network, config, mesh, *case) for case in networks),
        *(partial(_rate, config, mesh, *shape) for shape in config.rates),
        *(partial(pipeline_group, config, mesh, *shape) for shape in config.pipelines),
        *layers,
    ]


def _write(folder: RunFolder, about: dict[str, Any], groups: list[Group]) -> None:
    result = {
        "benchmark": "step",
        "machine": _plain(about),
        "rows": [_plain({"what": group.what} | row) for group in groups for row in group.rows],
        "marks": [_plain({"what": group.what} | mark) for group in groups for mark in group.marks],
    }
    path = folder.path / "result.json"
    write_atomically(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: plain(value) for key, value in row.items()}


@dataclass(frozen=True)
class Problem:
    """The step of training that all candidates take.

    Args:
        widths: D of the first layer, then d of every layer, ReLU between them.
        weights: (d, D) of every layer, whole.
        x: (m, D), the samples.
        epsilon_squared: ε² a feature of the output's coding rate; None for its mean square.
    """

    widths: list[int]
    weights: list[Tensor]
    x: Tensor
    epsilon_squared: float | None
    learning_rate: float = LEARNING_RATE

    def loss(self, z: Tensor, layout: Layout = SINGLE) -> Tensor:
        """Of the output (m, d/tp): the mean square of all of it, or −R(Z)."""
        m, d = len(self.x), self.widths[-1]
        if self.epsilon_squared is None:
            return total(z.square().sum(), layout.features) / (m * d)
        return -coding_rate(z, self.epsilon_squared * d, layout, m, d)


class Step:
    """Forward, loss, backward and update.

    Args:
        network: inputs (m, D) → the output that ``loss`` takes.
        parameters: those of the network that this process holds.
    """

    def __init__(
        self,
        problem: Problem,
        network: Callable[[Tensor], Tensor],
        parameters: Iterable[nn.Parameter],
        loss: Callable[[Tensor], Tensor],
    ) -> None:
        self.x, self.network, self.loss = problem.x, network, loss
        self.optimizer = torch.optim.SGD(parameters, problem.learning_rate)

    def __call__(self) -> Tensor:
        loss = self.loss(self.network(self.x))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def make_problem(config: StepBench, mesh: Mesh, widths: list[int], m: int, loss: str) -> Problem:
    """Weights as the project initialises them, and Gaussian samples; the same on every process."""
    stack = DenseStack(widths[0], _model(widths)).init(config.seed)
    weights = [p.detach().to(mesh.device) for p in stack.parameters()]
    x = normal_rows((config.seed, IMAGES), range(m), widths[0]).to(mesh.device)
    return Problem(widths, weights, x, config.epsilon_squared if loss == "rate" else None)


def dense_step(problem: Problem, layout: Layout) -> Candidate:
    """A step of our layers: own units, activations gathered for the next layer."""
    widths = problem.widths
    stack = DenseStack(widths[0], _model(widths), layout).to(problem.x.device, problem.x.dtype)
    last = layer_name(stack.num_layers - 1)
    with torch.no_grad():
        for i, weight in enumerate(problem.weights):
            units = stack.layer(i).units
            stack.layer(i).weight.copy_(weight[units.start : units.stop])
    parameters = list(stack.parameters())
    step = Step(problem, lambda x: stack(x)[last], parameters, lambda z: problem.loss(z, layout))
    return Candidate(step, parameters)


def _model(widths: list[int]) -> ModelConfig:
    return ModelConfig(widths[1:], nonlinearity="relu", standardise=False)


class SilentAxis(Axis):
    """The shape of an axis without its messages: the same work on this process, of no worth."""

    def __init__(self, axis: Axis) -> None:
        self.size, self.rank = axis.size, axis.rank

    def gather(self, tensor: Tensor, total: int, dim: int = 0) -> Tensor:
        return torch.cat([tensor] * self.size, dim).narrow(dim, 0, total)


def _network(config: StepBench, mesh: Mesh, widths: list[int], m: int, loss: str) -> Group:
    """A step of a network: ours beside the others, beside silent processes, and beside one."""
    from dense2conv.bench import step_rivals  # only here: these packages take seconds to load

    problem = make_problem(config, mesh, widths, m, loss)
    rivals = {
        "DTensor": step_rivals.with_dtensor(problem, mesh),
        "FairScale": step_rivals.with_fairscale(problem, mesh),
        "DeepSpeed": step_rivals.with_deepspeed(problem, mesh),
    }
    candidates = {
        "ours": dense_step(problem, mesh.layout),
        **rivals,
        "silent": dense_step(problem, Layout(features=SilentAxis(mesh.tp))),
        "one process": on_one(mesh, lambda: dense_step(problem, SINGLE)),
    }
    problem.weights.clear()  # every candidate has its own
    times, rows = measure(mesh, candidates, config.pairs, config.seconds)
    marks = [_silent_mark(times)]
    if loss == "plain":
        best = min((name for name in rivals if name in times), key=lambda name: median(times[name]))
        ratio = Ratio.of(times["ours"], times[best])
        bound, met = "level if its interval reaches 1", ratio.low <= 1
        marks.append(mark(f"ours / {best}, the best of the others", ratio, bound, met))
    return Group(f"{arrows(widths)}, {loss} loss, batch {m}", rows, marks)


def _rate(config: StepBench, mesh: Mesh, m: int, d: int) -> Group:
    """The rate alone, forward and backward, of sharded features: ours beside DTensor."""
    from dense2conv.bench import step_rivals

    columns = mesh.tp.shard(d)
    generator = torch.Generator().manual_seed(config.seed)
    whole = torch.randn(m, d, generator=generator).to(mesh.device)
    own = whole[:, columns.start : columns.stop].contiguous()  # (m, d/tp)
    epsilon_squared = config.epsilon_squared * d

    def candidate(rate: Callable[[Tensor], Tensor], features: Tensor) -> Candidate:
        leaf = features.clone().requires_grad_()

        def work() -> None:
            rate(leaf).backward()
            leaf.grad = None

        return Candidate(work, [leaf])

    def ours(layout: Layout) -> Callable[[Tensor], Tensor]:
        return lambda z: coding_rate(z, epsilon_squared, layout, m, d)

    def dtensor(z: Tensor) -> Tensor:
        return step_rivals.small_rate(step_rivals.sharded(z, mesh), epsilon_squared)

    candidates = {
        "ours": candidate(ours(mesh.layout), own),
        "DTensor": candidate(dtensor, own),
        "silent": candidate(ours(Layout(features=SilentAxis(mesh.tp))), own),
        "one process": on_one(mesh, lambda: candidate(ours(SINGLE), whole)),
    }
    times, rows = measure(mesh, candidates, config.pairs, config.seconds)
    ratio = Ratio.of(times["DTensor"], times["ours"])
    marks = [mark("DTensor / ours", ratio, "at least 1.8", ratio.median >= 1.8)]
    return Group(f"the rate alone of {m} × {d}, forward and backward", rows, marks)


def _calibrate(config: StepBench, mesh: Mesh) -> Ratio:
    """How much faster than one process all are that each do their share of a product in silence."""
    n = config.calibration
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(config.seed)).to(mesh.device)
    share = mesh.tp.shard(n)
    own = a[share.start : share.stop]
    works: dict[str, Work] = {
        "one": (lambda: a @ a) if mesh.is_main else (lambda: None),
        "silent": lambda: own @ a,
    }
    times = interleaved(works, config.pairs, math.inf, synchroniser(mesh))
    return Ratio.of(times["one"], times["silent"])


def _on_cores(speed: Ratio, num_processes: int) -> str:
    """Whether the processes run side by side, in a sentence."""
    verdict = (
        "they run side by side"
        if speed.median >= _SIDE_BY_SIDE * num_processes
        else "they do NOT run side by side here, so judge a pipeline by its counted idle slots"
    )
    return (
        f"{num_processes} silent processes, each with its share of a product, are {speed} times as "
        f"fast as one with all of it: {verdict}"
    )


def _silent_mark(times: dict[str, list[float]]) -> dict[str, Any]:
    ratio = Ratio.of(times["ours"], times["silent"])
    return mark("ours / silent", ratio, "at most 1.15", ratio.median <= 1.15)
