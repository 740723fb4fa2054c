"""Tied fine-tuning: an extracted layer trained on the dense layer's own objective, weights shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dense2conv.bar import Bar
from dense2conv.objectives import EfficientCoding
from dense2conv.shapes import Axis, InputError, Layout
from dense2conv.structure import ExtractedLayer
from dense2conv.training.optim import OptimizerConfig, learning_rate


@dataclass
class TuneConfig:
    """The short fine-tune of an extracted network."""

    steps: int = field(default=300, metadata={"help": "steps of tied fine-tuning, 0 for none"})
    lr: float = field(default=0.01, metadata={"help": "learning rate of the kernels and gains"})

    def validate(self) -> None:
        """Raise InputError for a number that cannot be."""
        if self.steps < 0:
            raise InputError(f"tune.steps={self.steps}; use 0 or more")
        if not self.lr > 0:
            raise InputError(f"tune.lr={self.lr}; use a positive number")


def tune(
    layer: ExtractedLayer,
    objective: EfficientCoding,
    l1: float,
    config: TuneConfig,
    next_inputs: Callable[[int], Tensor],
    num_samples: int,
    axis: Axis,
    progress: bool = False,
) -> None:
    """Maximise R − power − λ‖W‖₁ over kernels, gains and left-over weights, W taken unrolled; in
    place.

    Every process holds the whole (small) layer and a share of the samples; the objective and its
    gradients are those of the whole batch.

    Args:
        layer: the extracted layer, the same on every process, and so it stays.
        objective: the dense layer's objective.
        l1: λ.
        config: steps and learning rate.
        next_inputs: step → own samples (m/n, D) of that step's batch.
        num_samples: m.
        axis: the n processes.
        progress: whether to show a bar on a terminal.
    """
    parameters = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=config.lr)
    schedule = OptimizerConfig(lr=config.lr, warmup=10, final_lr=0.01)
    layout = Layout(samples=axis)
    hidden = None if progress else True  # None: shown on a terminal only
    for step in Bar(range(config.steps), "tuning", leave=False, unit="step", disable=hidden):
        z = layer(next_inputs(step))  # (m/n, d)
        terms = objective(z, num_samples, layer.num_units, layout)
        # L1 is the same on every process and their gradients are summed: each takes its part.
        loss = (terms.loss + l1 / axis.size * layer.unrolled_l1()) / layer.num_units
        optimizer.zero_grad()
        loss.backward()
        for p in parameters:
            if p.grad is not None:
                p.grad = axis.sum(p.grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step, config.steps)
        optimizer.step()
