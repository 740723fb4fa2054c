"""λ of every layer: as given, or steered until the share of its weights that was asked for is 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dense2conv.models import DenseStack
from dense2conv.models.dense_stack import layer_name
from dense2conv.objectives import ObjectiveConfig

# How far λ may move in a step, as a share: little at first, since too much L1 kills units for good.
# Towards the end, where small steps let weights return to 0 too late, it has to follow each batch.
_FIRST, _LAST, _ORDER = 0.01, 0.2, 4


class Strengths(Mapping[int, float | Tensor]):
    """λ of each held layer by index, which the optimizer's proximal step reads from its groups.

    With ``objective.sparsity`` it is an fp64 scalar on the weights' device, and nobody waits for its
    value. It depends on the weights' number of zeros and the step alone, so it is the same on any mesh.

    Args:
        config: λ, or where it starts, and the share of zeros that it is steered to.
        stack: the held layers.
        optimizer: as ``make_optimizer`` gives it, before an engine takes it apart.
        before: λ by a layer's name, from a checkpoint.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        stack: DenseStack,
        optimizer: Optimizer,
        before: Mapping[str, float] | None = None,
    ) -> None:
        self._target = config.sparsity
        self._groups: dict[int, dict[str, Any]] = {}
        for i in stack.indices:
            weight = stack.layer(i).weight
            group = next(g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
            if self._target is not None:
                start = (before or {}).get(layer_name(i), config.l1)
                group["l1"] = torch.tensor(start, dtype=torch.float64, device=weight.device)
            self._groups[i] = group

    def __getitem__(self, index: int) -> float | Tensor:
        strength: float | Tensor = self._groups[index]["l1"]
        return strength

    def __iter__(self) -> Iterator[int]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def steer(self, sparsity: Mapping[int, Tensor], progress: float) -> None:
        """λ ← λ (ρ/ρ*)^g behind a step, the share ρ of weights that are not 0 against what it should be.

        Args:
            sparsity: 1 − ρ of each held layer, scalars on the device.
            progress: share of the run that is done; the gain g grows with it.
        """
        if self._target is None:
            return
        gain = _FIRST + (_LAST - _FIRST) * progress**_ORDER
        for i, zeros in sparsity.items():
            excess = ((1 - zeros) / (1 - self._target)).log().clamp(-1, 1)
            self._groups[i]["l1"].mul_((gain * excess).exp())

    def state(self) -> dict[str, float]:
        """λ by name, for a checkpoint; empty where it is not steered."""
        if self._target is None:
            return {}
        return {layer_name(i): float(strength) for i, strength in self.items()}
