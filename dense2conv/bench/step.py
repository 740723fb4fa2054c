"""``dense2conv bench step``: a training step of sharded layers beside other packages, in time and memory.

m   samples     D   inputs of a layer     d   units of a layer, d/tp of them held here
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dense2conv.bench.timing import Ratio, Work, aligned, interleaved, machine, peak_bytes, plain
from dense2conv.files import write_atomically
from dense2conv.models import DenseStack, ModelConfig
from dense2conv.models.dense_stack import DenseLayer, layer_name
from dense2conv.objectives import coding_rate
from dense2conv.objectives.sums import total
from dense2conv.parallel import Mesh, ParallelConfig
from dense2conv.parallel.mesh import make_mesh
from dense2conv.parallel.pipeline import Pipeline
from dense2conv.rng import IMAGES, normal_rows
from dense2conv.shapes import SINGLE, Axis, InputError, Layout
from dense2conv.training.run_folder import RunConfig, RunFolder

LEARNING_RATE = 1e-6  # the update is made and timed, and moves next to nothing
_LOSSES = ("plain", "rate")
BATCHES = 4  # pass through a pipeline in one measurement
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
    from dense2conv.bench.utilisation import layer_utilisation

    networks = product(config.networks, config.batches, config.losses)
    layers: list[Callable[[], Group]]
    layers = [partial(layer_utilisation, config, mesh, *shape) for shape in config.whole_layers]
    if mesh.tp.size == 1:
        return layers  # the rest is about several processes
    return [
        *(partial(_network, config, mesh, *case) for case in networks),
        *(partial(_rate, config, mesh, *shape) for shape in config.rates),
        *(partial(_pipeline, config, mesh, *shape) for shape in config.pipelines),
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
class Candidate:
    """One way to do the work; ``kept`` is what it holds on this process between two times.

    Without ``work`` it cannot be had here, and ``note`` says why.
    """

    work: Work | None
    kept: Iterable[Tensor] = ()
    note: str = ""


@dataclass(frozen=True)
class Group:
    """Candidates that took turns, a row each, ours first; and the marks that ours is held to."""

    what: str
    rows: list[dict[str, Any]]
    marks: list[dict[str, Any]]

    def __str__(self) -> str:
        lines = [[self.what, "ms", "time / ours", "MiB a process", ""]]
        for row in self.rows:
            figures = ["", "", ""]
            if "seconds" in row:
                milliseconds, mebibytes = 1e3 * row["seconds"], row["peak_bytes"] / 2**20
                figures = [f"{milliseconds:.4g}", str(row["ratio"]), f"{mebibytes:.1f}"]
            lines.append([f"  {row['candidate']}", *figures, row["note"]])
        text = aligned(lines)
        for mark in self.marks:
            met = "met" if mark["met"] else "MISSED"
            text.append(f"  {mark['mark']}: {mark['is']}; {mark['bound']}: {met}")
        return "\n".join(text)


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
        "one process": _on_one(mesh, lambda: dense_step(problem, SINGLE)),
    }
    problem.weights.clear()  # every candidate has its own
    times, rows = measure(config, mesh, candidates)
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
        "one process": _on_one(mesh, lambda: candidate(ours(SINGLE), whole)),
    }
    times, rows = measure(config, mesh, candidates)
    ratio = Ratio.of(times["DTensor"], times["ours"])
    marks = [mark("DTensor / ours", ratio, "at least 1.8", ratio.median >= 1.8)]
    return Group(f"the rate alone of {m} × {d}, forward and backward", rows, marks)


def _on_one(mesh: Mesh, make: Callable[[], Candidate]) -> Candidate:
    """A candidate of the first process; the others wait."""
    return make() if mesh.is_main else Candidate(lambda: None)


@dataclass
class Clock:
    """Seconds of a pipeline's stage, and how many of these it was idle."""

    wall: float = 0.0
    idle: float = 0.0

    @property
    def busy(self) -> float:
        return 1 - self.idle / self.wall if self.wall else math.nan


class LayerWiseStage:
    """A stage that codes for itself and sends its activations on: nothing flows back.

    Batch t+1 enters while batch t is still in the later stages. Every call is ``BATCHES`` batches.

    Args:
        mesh: with one stage a process.
        layer: the stage.
        x: (m, D), the batch that enters the first stage.
        microbatches: M.
        input_gradient: make the gradient of the inputs too, which nobody needs: then a stage has
            the very products of one that is back-propagated through.
    """

    def __init__(
        self, mesh: Mesh, layer: DenseLayer, x: Tensor, microbatches: int, input_gradient: bool
    ) -> None:
        self.layer, self.x, self.microbatches = layer, x, microbatches
        self.input_gradient = input_gradient
        self.pipeline = Pipeline(mesh, microbatches)
        self.optimizer = torch.optim.SGD(layer.parameters(), LEARNING_RATE)
        self.clock = Clock()

    def __call__(self) -> None:
        for batch in range(BATCHES):
            began = time.perf_counter()
            self._batch()
            waited = self.pipeline.take_seconds_waited()
            if batch > 0:  # the first fills the pipeline
                self.clock.wall += time.perf_counter() - began
                self.clock.idle += waited
        self.pipeline.drain()

    def _batch(self) -> None:
        outputs = []
        for piece in self._pieces():
            z = self.layer(piece.requires_grad_(self.input_gradient))  # (m/M, d)
            outputs.append(z)
            if not self.pipeline.is_last:
                self.pipeline.send(F.relu(z.detach()))
        for z in outputs:
            z.square().mean().div(self.microbatches).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _pieces(self) -> Iterator[Tensor]:
        m, width = self.x.shape
        if self.pipeline.is_first:
            yield from self.x.detach().chunk(self.microbatches)
            return
        shape = (m // self.microbatches, width)
        for _ in range(self.microbatches):
            yield self.pipeline.receive(shape, self.x.dtype)


def _pipeline(config: StepBench, mesh: Mesh, width: int, m: int) -> Group:
    """A pipeline of equal layers: layer-wise objectives beside one that is back-propagated."""
    from dense2conv.bench import step_rivals

    stages = make_mesh(mesh.tp.size, 1, 1, mesh.device)
    x = normal_rows((config.seed, IMAGES), range(m), width).to(mesh.device)

    def layer() -> DenseLayer:
        layer = DenseLayer(width, width, range(width), bias=False)
        layer.init(config.seed, stages.pp.rank, 1.0)
        return layer.to(mesh.device)

    pieces = config.microbatches
    back_propagated = "all forward, all backward"
    works: dict[str, LayerWiseStage | step_rivals.BackPropagatedStage] = {
        "ours": LayerWiseStage(stages, layer(), x, pieces, input_gradient=True),
        "ours, no input gradient": LayerWiseStage(stages, layer(), x, pieces, input_gradient=False),
        back_propagated: step_rivals.BackPropagatedStage(stages, layer(), x, pieces),
    }
    candidates = {
        name: Candidate(work, [x, *work.layer.parameters()]) for name, work in works.items()
    }
    times, rows = measure(config, mesh, candidates)
    # Of a batch's slots, each the work of one piece: those in which a stage fills or drains.
    bubble = (stages.pp.size - 1) / (pieces + stages.pp.size - 1)
    for row, (name, work) in zip(rows, works.items(), strict=True):
        row["seconds"] /= BATCHES
        row["busy"] = _everywhere(mesh, work.clock.busy)
        row["idle_slots"] = bubble if name == back_propagated else 0.0
        busy = ", ".join(f"{share:.1%}" for share in row["busy"])
        row["note"] = f"stages busy {busy}; idle slots by count {row['idle_slots']:.0%}"
    ratio, least = Ratio.of(times[back_propagated], times["ours"]), min(rows[0]["busy"])
    marks = [
        mark(f"{back_propagated} / ours", ratio, "at least 1.15", ratio.median >= 1.15),
        mark("our least busy stage", round(least, 4), "at least 0.95", least >= 0.95),
    ]
    what = f"pipeline {arrows([width] * (stages.pp.size + 1))}, batch {m} in {pieces} pieces"
    return Group(what, rows, marks)


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
    times = interleaved(works, config.pairs, math.inf, _synchroniser(mesh))
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


def measure(
    config: StepBench, mesh: Mesh, candidates: dict[str, Candidate]
) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """Seconds of every candidate round by round, and a row each."""
    synchronise = _synchroniser(mesh)
    works = {name: each.work for name, each in candidates.items() if each.work is not None}
    began = time.perf_counter()
    for work in works.values():
        work()
    # Agreed by all: a process that stopped by its own clock would leave the others waiting.
    round_seconds = max(_everywhere(mesh, time.perf_counter() - began))
    num_rounds = min(config.pairs, max(3, int(config.seconds / round_seconds)))
    times = interleaved(works, num_rounds, math.inf, synchronise)
    rows = []
    for name, candidate in candidates.items():
        row: dict[str, Any] = {"candidate": name, "note": candidate.note}
        if name in works:
            synchronise()
            peak = sum(t.nbytes for t in candidate.kept) + peak_bytes(works[name], mesh.device)
            row["seconds"] = median(times[name])
            row["ratio"] = Ratio.of(times[name], times["ours"])
            row["peak_bytes"] = int(max(_everywhere(mesh, peak)))
        rows.append(row)
    return times, rows


def _everywhere(mesh: Mesh, number: float) -> list[float]:
    """Every process's number."""
    own = torch.tensor([number], dtype=torch.float64, device=mesh.device)
    return [float(each) for each in mesh.tp.gather(own, mesh.tp.size)]


def _synchroniser(mesh: Mesh) -> Work:
    """Wait for the device and for the other processes."""
    return lambda: mesh.tp.sum(torch.zeros((), device=mesh.device)).item()


def _silent_mark(times: dict[str, list[float]]) -> dict[str, Any]:
    ratio = Ratio.of(times["ours"], times["silent"])
    return mark("ours / silent", ratio, "at most 1.15", ratio.median <= 1.15)


def mark(name: str, value: Ratio | float, bound: str, met: bool) -> dict[str, Any]:
    return {"mark": name, "is": value, "bound": bound, "met": met}


def arrows(widths: list[int]) -> str:
    return "→".join(map(str, widths))
