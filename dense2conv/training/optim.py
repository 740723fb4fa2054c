"""Optimizers whose steps end in the exact proximal map of λ‖W‖₁."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dense2conv.objectives import soft_threshold
from dense2conv.shapes import InputError


@dataclass
class OptimizerConfig:
    """How weights move."""

    name: str = field(
        default="prox_adam",
        metadata={
            "help": "prox_adam, or any class of torch.optim (AdamW, SGD, …) followed by the prox"
        },
    )
    lr: float = field(default=0.02, metadata={"help": "learning rate at its highest"})
    warmup: int = field(default=30, metadata={"help": "steps of linear warm-up"})
    final_lr: float = field(
        default=1e-3, metadata={"help": "share of the learning rate that the cosine ends at"}
    )
    clip: float | None = field(
        default=None,
        metadata={
            "help": "limit of the gradient's norm: the network's, or each layer's if layer-wise"
        },
    )
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further arguments of the optimizer, e.g. '{momentum: 0.9}'"},
    )

    def validate(self) -> None:
        """Raise InputError for an optimizer or a rate that cannot be."""
        if self.name != "prox_adam" and not _is_optimizer(self.name):
            raise InputError(
                f"optimizer.name={self.name!r} is unknown; use prox_adam or a class of torch.optim"
            )
        if not self.lr > 0:
            raise InputError(f"optimizer.lr={self.lr}; use a positive number")


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine down to ``final_lr``; a pure function of the step."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, num_steps))))
    return config.lr * warm * (config.final_lr + (1 - config.final_lr) * cosine)


def make_optimizer(
    config: OptimizerConfig, module: nn.Module, l1: float, compiled: bool = False
) -> Optimizer:
    """The optimizer of ``config``; matrices pay λ = ``l1`` a unit of magnitude, biases nothing.

    Each matrix is a group of its own, whose ``l1`` may be changed, or be a scalar on the device.
    """
    parameters = list(module.parameters())
    groups = [{"params": [p], "l1": l1} for p in parameters if p.ndim == 2]
    rest = [p for p in parameters if p.ndim != 2]
    groups += [{"params": rest, "l1": 0.0}] if rest else []
    if config.name == "prox_adam":
        return ProxAdam(groups, lr=config.lr, compiled=compiled, **config.options)
    optimizer: Optimizer = getattr(torch.optim, config.name)(groups, lr=config.lr, **config.options)
    optimizer.register_step_post_hook(_proximal_step)
    return optimizer


class ProxAdam(Optimizer):
    """Adam with one second moment a row, so that the soft threshold is the exact proximal map.

    With a scalar metric per row, argmin_u ½ v_r‖u − w‖² + λ‖u‖₁ separates into soft thresholds of
    one size per row; Adam's own metric, one number a weight, would threshold the weights with the
    smallest gradients most. It also holds one full-size state instead of two.

    Args:
        params: parameters or groups; a group's ``l1`` is its λ.
        lr: learning rate.
        betas: decay of the momentum and of the rows' second moment.
        eps: added to the root of the second moment.
        l1: λ of groups that name none.
        compiled: let torch.compile fuse a parameter's step into two passes.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-12,
        l1: float = 0.0,
        compiled: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "l1": l1})
        # What goes over the weights; the rows' figures between them change with every step.
        self._accumulate = torch.compile(_accumulate) if compiled else _accumulate
        self._descend = torch.compile(_descend) if compiled else _descend

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step: momentum, row metric, gradient step, soft threshold."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["momentum"] = torch.zeros_like(p)
                    state["row_metric"] = p.new_zeros(p.shape[0], *[1] * (p.ndim - 1))
                state["step"] += 1
                step = state["step"].double()  # a tensor: nobody waits for its value
                momentum, metric = state["momentum"], state["row_metric"]
                square = self._accumulate(momentum, p.grad, 1 - beta1)
                metric.lerp_(square.view_as(metric) / p.shape[1:].numel(), 1 - beta2)
                root = (metric / (1 - beta2**step)).sqrt_().add_(group["eps"])
                step_size = group["lr"] / root  # (d, 1): one a row
                threshold = step_size * group["l1"] if _pays(group) else None
                self._descend(p, momentum, step_size / (1 - beta1**step), threshold)
        return loss


def _accumulate(momentum: Tensor, grad: Tensor, weight: float) -> Tensor:
    """Move the momentum (d, …) towards the gradient; ‖g_r‖² of its rows: (d,)."""
    momentum.lerp_(grad, weight)
    rows = grad.flatten(1) if grad.ndim > 1 else grad[:, None]
    return torch.linalg.vector_norm(rows, dim=1).square_()


def _descend(p: Tensor, momentum: Tensor, step_size: Tensor, threshold: Tensor | None) -> None:
    """Gradient step of ``p`` (d, …) and soft threshold, each of one size a row: (d, 1, …)."""
    p.addcmul_(momentum, step_size, value=-1)
    if threshold is not None:
        soft_threshold(p, threshold)


def _proximal_step(optimizer: Optimizer, *_: Any) -> None:
    """Behind a torch optimizer's step: the proximal map in the Euclidean metric."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if _pays(group) and p.grad is not None:
                soft_threshold(p, group["lr"] * group["l1"])


def _pays(group: dict[str, Any]) -> bool:
    """Whether a group has a λ at all; that of a steered one stays on its device."""
    return isinstance(group["l1"], Tensor) or bool(group["l1"])


def _is_optimizer(name: str) -> bool:
    found = getattr(torch.optim, name, None)
    return isinstance(found, type) and issubclass(found, Optimizer) and found is not Optimizer
