"""A pipeline of equal layers for ``dense2conv bench step``: layer-wise objectives beside one at the top.

m   samples     d   units of every layer     M   micro-batches
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dense2conv.bench.groups import (
    LEARNING_RATE,
    Candidate,
    Group,
    arrows,
    everywhere,
    mark,
    measure,
)
from dense2conv.bench.timing import Ratio
from dense2conv.models.dense_stack import DenseLayer
from dense2conv.parallel import Mesh
from dense2conv.parallel.mesh import make_mesh
from dense2conv.parallel.pipeline import Pipeline
from dense2conv.rng import IMAGES, normal_rows

if TYPE_CHECKING:
    from dense2conv.bench.step import StepBench

BATCHES = 4  # pass through a pipeline in one measurement


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


def pipeline_group(config: StepBench, mesh: Mesh, width: int, m: int) -> Group:
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
    times, rows = measure(mesh, candidates, config.pairs, config.seconds)
    # Of a batch's slots, each the work of one piece: those in which a stage fills or drains.
    bubble = (stages.pp.size - 1) / (pieces + stages.pp.size - 1)
    for row, (name, work) in zip(rows, works.items(), strict=True):
        row["seconds"] /= BATCHES
        row["busy"] = everywhere(mesh, work.clock.busy)
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
