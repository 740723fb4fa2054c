"""A step of a plan's mesh by the real code, one process a stage, none of the others there."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dense2conv.data.source import Images, ImageSource
from dense2conv.objectives import EfficientCoding, Terms
from dense2conv.parallel.engines import make_engine
from dense2conv.parallel.rehearsal import Calls, fake_group, without_numbers
from dense2conv.planner.config import PlanConfig
from dense2conv.planner.plan import Estimate, Stage
from dense2conv.planner.share import DRAWN
from dense2conv.shapes import Geometry
from dense2conv.training.loop import build_stack, next_batch
from dense2conv.training.measures import layer_metrics
from dense2conv.training.optim import make_optimizer
from dense2conv.training.strengths import Strengths


@dataclass(frozen=True)
class Rehearsal:
    """What the first process of a stage did in a step, beside what was planned for it."""

    calls: Calls
    planned_calls: Calls
    peak_bytes: int
    planned_bytes: int

    @property
    def differences(self) -> list[str]:
        """Collectives of which there were more or fewer than planned."""
        return [
            f"{kind} of {num_bytes} bytes over {axis}: {self.calls[kind, axis, num_bytes]} "
            f"instead of {self.planned_calls[kind, axis, num_bytes]}"
            for kind, axis, num_bytes in sorted(self.calls.keys() | self.planned_calls.keys())
            if self.calls[kind, axis, num_bytes] != self.planned_calls[kind, axis, num_bytes]
        ]


def rehearse(config: PlanConfig) -> list[Rehearsal]:
    """A step of the first process of each pipeline stage of ``config.parallel``.

    Images are blank, and metrics are those of every step. Over gloo the same sums are sent in pieces.
    Gradients of micro-batches are added up out of place here, which real tensors' are not: that is
    one layer's gradient more.

    Raises:
        InputError: this process is one of a job.
    """
    objective = dataclasses.replace(config.objective, sparsity=None)  # no proximal step, see below
    config = dataclasses.replace(config, objective=objective, gram_dtype="float64")
    return [_rehearse(config, stage) for stage in Estimate(config, config.parallel).stages]


def rehearsal_lines(rehearsals: list[Rehearsal]) -> list[str]:
    """What each stage did, for people."""
    lines = ["a step of a process of each stage, rehearsed without numbers"]
    for i, found in enumerate(rehearsals, start=1):
        agreed = f"the plan has {found.planned_calls.total()}: {'; '.join(found.differences)}"
        if not found.differences:
            agreed = "the same as planned"
        lines.append(
            f"  {f'stage {i}':20}{found.calls.total()} collectives, {agreed}; tensors take "
            f"{found.peak_bytes / 1e9:.3g} GB at most, planned {found.planned_bytes / 1e9:.3g} GB"
        )
    return lines


def _rehearse(config: PlanConfig, stage: Stage) -> Rehearsal:
    planned: Calls = Counter()
    for call in stage.collectives:
        planned[call.kind, call.axis, call.num_bytes] += call.count
    mesh = config.parallel
    rank = stage.share.stage * mesh.dp * mesh.tp
    calls, peak = _step(config, rank)
    return Rehearsal(calls, planned, peak, stage.memory.step - stage.memory.process)


def _step(config: PlanConfig, rank: int) -> tuple[Calls, int]:
    """The collectives of a step of a rank, and the most bytes that its tensors take at once."""
    sizes, batch = config.parallel, config.train.batch
    mode = FakeTensorMode()
    with fake_group(sizes, rank) as (mesh, recorder):
        with without_numbers(recorder, mode):
            stack = build_stack(config, mesh, config.data.shape.numel)
            # Without the proximal step, which sends nothing, and goes through huge weights in pieces so
            # small that their number takes half a minute here.
            optimizer = make_optimizer(config.optimizer, stack, l1=0.0)
            source = _Blank(config)
        objective = EfficientCoding(config.objective, stack.activation, config.data.input_noise_std)
        # It asks the mesh for its neighbours, which are real numbers.
        engine = make_engine(
            *(config.engine, config.deepspeed, mesh, stack, objective, optimizer, batch),
            *(sizes.microbatches, config.optimizer.clip, config.train.compute_dtype),
            sizes.shard == "weights",
        )
        with without_numbers(recorder, mode):
            for _ in range(2):  # the first one makes the optimizer's state
                recorder.calls.clear()
                rows = mesh.dp.shard(batch)
                x = next_batch(config, mesh, source, 0, rows) if engine.takes_images else None
                terms = engine.forward_backward(x)
                engine.step(config.optimizer.lr)
                # A stage without an objective of its own has no terms.
                terms = terms or {"layer1": Terms(torch.zeros(()), torch.zeros(()))}
                layer_metrics(stack, terms, Strengths(config.objective, stack, optimizer))
        return recorder.calls, recorder.peak


class _Blank(ImageSource):
    """Images without pixels, in the type that the configuration's have."""

    def __init__(self, config: PlanConfig) -> None:
        self.geometry = Geometry.of_image(config.data.shape)
        self._dtype = torch.float32 if config.data.kind in DRAWN else torch.uint8

    def read(self, step: int, batch: int, rows: range) -> Images:
        return Images(torch.empty(len(rows), len(self.geometry), dtype=self._dtype))

    def read_training_sample(self, num: int, rows: range | None = None) -> Images:
        return self.read(0, num, rows or range(num))

    def read_held_out(self, num: int, rows: range | None = None) -> Images:
        return self.read(0, num, rows or range(num))

    def standardise(self, pixels: Tensor) -> Tensor:
        return pixels.float()

    def fingerprint(self) -> str:
        return "blank"
