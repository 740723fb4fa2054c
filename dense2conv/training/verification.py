"""Is what was extracted the network that was trained? Held-out figures, and the controls beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from dense2conv.objectives import EfficientCoding, ObjectiveConfig
from dense2conv.shapes import SINGLE, Layout

NUM_HELD_OUT = 4096
PIECE = 256  # samples that a layer is shown at once
_MAX_CONTROL_INPUTS = 4096  # ZCA needs the D×D covariance
_NO_GAIN = 0.01  # nats a unit; whitening that gains less is no yardstick


class HeldOut(NamedTuple):
    """Nats a unit on held-out images, without input noise, over all units."""

    rate_minus_power: float
    objective: float


def in_pieces(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``layer`` of many samples (m, D), a few at a time: what it makes on the way stays small."""
    return torch.cat([layer(piece) for piece in x.split(PIECE)])


def held_out(
    objective: EfficientCoding,
    z: Tensor,
    l1_norm: float,
    l1: float,
    num_units: int,
    layout: Layout = SINGLE,
) -> HeldOut:
    """R − power and R − power − λ‖W‖₁ of a layer, a unit.

    Args:
        objective: the layer's objective.
        z: (m, d/tp) linear outputs held here.
        l1_norm: ‖W‖₁ of the whole layer.
        l1: λ.
        num_units: d.
        layout: how z is spread.
    """
    with torch.no_grad():
        terms = objective(z, z.shape[0] * layout.samples.size, num_units, layout)
    gain = float(terms.rate - terms.power) / num_units
    return HeldOut(gain, gain - l1 * l1_norm / num_units)


def explained(target: Tensor, residual: Tensor, layout: Layout = SINGLE) -> float | None:
    """R² pooled over units: 1 − Σ residual² / Σ variance; None where nothing varies.

    Args:
        target: (m, n) outputs of the dense units, any number of them held here.
        residual: (m, n) what is left of them.
        layout: sums go over ``layout.features``.
    """
    target, residual = target.double(), residual.double()
    sums = torch.stack([residual.square().sum(), (target - target.mean(0)).square().sum()])
    residual_sum, variance = layout.features.sum(sums).tolist()
    return 1 - residual_sum / variance if variance > 0 else None


class Controls(NamedTuple):
    """What a layer is judged against: no structure at all, and structure without sparsity."""

    identity: HeldOut
    zca: HeldOut


def controls(
    config: ObjectiveConfig, train: Tensor, test: Tensor, num_units: int
) -> Controls | None:
    """The best scaled identity and ZCA whitening, as layers of ``num_units`` units.

    The identity gets the scale that is best on the held-out images themselves, separately with and
    without L1. ZCA is C^(−1/2) of the training covariance, times the root of 1/μ − σ²: the maximum
    of R − power. With fewer units than inputs they are that many pixels, evenly spaced, and the
    first principal components; with more, the units beyond D would add nothing and are 0.

    Args:
        config: σ², μ and λ.
        train, test: (·, D) inputs without noise.
        num_units: d.

    Returns:
        None where D is too large for a D×D covariance, or the objective has no power term.
    """
    num_inputs = train.shape[1]
    if num_inputs > _MAX_CONTROL_INPUTS or config.power <= 0:
        return None
    rank = min(num_units, num_inputs)
    sigma_squared, m = config.sigma_squared(num_units), len(test)
    train, test = train.double(), test.double()
    pixels = test[:, torch.linspace(0, num_inputs - 1, rank).round().long()]  # (m, rank)
    spectrum = torch.linalg.eigvalsh(pixels.T @ pixels / m).clamp(min=0).cpu().numpy()

    def rate_minus_power(scale: float) -> float:
        rate = 0.5 * np.log1p(scale**2 * spectrum / sigma_squared).sum()
        return float(rate - config.power / 2 * scale**2 * spectrum.sum()) / num_units

    def objective(scale: float) -> float:
        return rate_minus_power(scale) - config.l1 * scale * rank / num_units

    def best(value: Callable[[float], float]) -> float:
        found = minimize_scalar(lambda s: -value(np.exp(s)), bounds=(-7, 5), method="bounded")
        return float(-found.fun)

    identity = HeldOut(best(rate_minus_power), best(objective))
    values, vectors = torch.linalg.eigh(train.T @ train / len(train))
    values, vectors = values[-rank:], vectors[:, -rank:]
    gains = (max(1 / config.power - sigma_squared, 0) / values.clamp(min=1e-9)).sqrt()
    weight = gains[:, None] * vectors.T  # (rank, D)
    if rank == num_inputs:
        weight = vectors @ weight  # of all whitenings the one closest to the pixels
    linear = EfficientCoding(config, activation=lambda z: z)
    z = torch.nn.functional.pad(test @ weight.T, (0, num_units - rank))  # (m, d)
    return Controls(identity, held_out(linear, z, float(weight.abs().sum()), config.l1, num_units))


def whitening_gain(dense: HeldOut, found: Controls | None) -> float | None:
    """(dense − identity) / (ZCA − identity) in R − power; None where whitening gains nothing."""
    if found is None:
        return None
    gap = found.zca.rate_minus_power - found.identity.rate_minus_power
    if gap < _NO_GAIN:
        return None
    return (dense.rate_minus_power - found.identity.rate_minus_power) / gap
