"""Efficient coding: maximise R(Z) − (μ/2) E‖z‖² − λ‖W‖₁.

R is invariant to rotation of the features, so alone it favours no connectivity. The power term
fixes the scale (with it, any whitening is optimal) and L1 picks the sparsest whitening.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from dense2conv.objectives.logdet import logdet_i_plus
from dense2conv.objectives.rates import gaussian_information
from dense2conv.objectives.sums import centred, total
from dense2conv.objectives.weight_rows import logdet_i_plus_of_rows
from dense2conv.shapes import SINGLE, Axis, InputError, Layout

DEFAULT_NOISE_VARIANCE = 0.01


@dataclass
class ObjectiveConfig:
    """What every layer maximises."""

    noise_variance: float | None = field(
        default=None,
        metadata={
            "help": "σ² of the noise at the output, sets the scale of R (0.01 if neither is set)"
        },
    )
    epsilon_squared: float | None = field(
        default=None, metadata={"help": "ε² in MCR²'s normalisation, σ² = ε²/units; instead of σ²"}
    )
    power: float = field(default=1.0, metadata={"help": "μ, the price of a unit's mean power"})
    l1: float = field(default=0.03, metadata={"help": "λ, the price of the weights' magnitudes"})
    sparsity: float | None = field(
        default=None,
        metadata={
            "help": "steer each layer's λ, from l1 on, until this share of its weights is 0; null: do not"
        },
    )
    on: str = field(
        default="pre",
        metadata={
            "help": "pre: the linear output is coded | post: behind the non-linearity, centred"
        },
    )
    scope: str = field(
        default="layerwise",
        metadata={"help": "layerwise: each layer its own objective | network: one at the top"},
    )
    batch_scope: str = field(
        default="global",
        metadata={
            "help": "global: the exact rate of the whole batch | local: of each dp rank's share"
        },
    )
    noise_correction: bool = field(
        default=False,
        metadata={"help": "subtract the information about the input noise itself from R"},
    )

    def validate(self) -> None:
        """Raise InputError where the fields contradict each other."""
        if self.noise_variance is not None and self.epsilon_squared is not None:
            raise InputError(
                f"objective.noise_variance={self.noise_variance} and objective.epsilon_squared="
                f"{self.epsilon_squared} are two names of one scale; set one of them to null"
            )
        for name in ("noise_variance", "epsilon_squared"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"objective.{name}={value}; use a positive number")
        for name in ("power", "l1"):
            if not getattr(self, name) >= 0:
                raise InputError(f"objective.{name}={getattr(self, name)}; use 0 or more")
        if self.sparsity is not None:
            if not 0 < self.sparsity < 1:
                raise InputError(
                    f"objective.sparsity={self.sparsity} is no share of weights that can be 0; use a "
                    "number between 0 and 1, such as 0.95, or null for a λ that stays"
                )
            if self.l1 == 0:
                raise InputError(
                    f"objective.l1=0 with objective.sparsity={self.sparsity}: λ is steered by factors; "
                    "start from a positive objective.l1"
                )
        for name, allowed in (
            ("on", ("pre", "post")),
            ("scope", ("layerwise", "network")),
            ("batch_scope", ("global", "local")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"objective.{name}={getattr(self, name)!r} is unknown; use {' or '.join(allowed)}"
                )

    def sigma_squared(self, num_features: int) -> float:
        """σ² of a layer of ``num_features`` units."""
        if self.epsilon_squared is not None:
            return self.epsilon_squared / num_features
        return DEFAULT_NOISE_VARIANCE if self.noise_variance is None else self.noise_variance


class Terms(NamedTuple):
    """The differentiable terms of one layer, sums over units, in nats."""

    rate: Tensor
    power: Tensor

    @property
    def loss(self) -> Tensor:
        """To be minimised; L1 is not in it, it is the proximal step's."""
        return self.power - self.rate


def _logdet_of_weight(
    weight: Tensor, alpha: float, axis: Axis, num_units: int, name: str
) -> Tensor:
    """logdet(I + α WWᵀ) of the layer's W (d, D), own rows (d/tp, D), on its small side."""
    num_inputs = weight.shape[1]
    if axis.size > 1 and num_units <= num_inputs:
        return logdet_i_plus_of_rows(weight, alpha, axis, num_units, name)
    # Wᵀ is a (D, d) matrix whose features are spread like z's; WᵀW is a sum over own rows.
    spread = Layout(features=axis)
    return logdet_i_plus(weight.T, alpha, spread, num_inputs, num_units, name)


class EfficientCoding:
    """The objective of a layer, given its linear output.

    Args:
        config: σ², μ and where the objective looks.
        activation: the layer's non-linearity, for ``on=post``.
        input_noise_std: of the layer's input, for ``noise_correction``.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        activation: Callable[[Tensor], Tensor],
        input_noise_std: float = 0.0,
    ) -> None:
        self.config = config
        self._activation = activation
        self._input_noise_std = input_noise_std

    def __call__(
        self,
        z: Tensor,
        num_samples: int,
        num_features: int,
        layout: Layout = SINGLE,
        weight: Tensor | None = None,
        name: str = "the layer",
    ) -> Terms:
        """R and (μ/2) E‖z‖² of the whole batch.

        Args:
            z: (m/dp, d/tp), the block of the linear output that is held here.
            num_samples, num_features: m and d.
            layout: how z is spread.
            weight: (d/tp, D), own rows, needed for ``noise_correction`` alone.
            name: of the layer, for error messages.
        """
        if self.config.on == "post":
            z = centred(self._activation(z), layout, num_samples)
        sigma_squared = self.config.sigma_squared(num_features)
        rate = gaussian_information(z, sigma_squared, layout, num_samples, num_features, name)
        if self.config.noise_correction and weight is not None and self._input_noise_std > 0:
            alpha = self._input_noise_std**2 / sigma_squared
            noise = _logdet_of_weight(weight, alpha, layout.features, num_features, name)
            rate = rate - 0.5 * noise
        power = total(z.square().sum(), layout.samples, layout.features)
        return Terms(rate, power * (self.config.power / 2 / num_samples))
