"""Coding rates: two normalisations of one log-determinant, and what bounds the features' power.

Rates grow with the features, so something must bound these: samples on the unit sphere, a limit on
their mean power, or a price on it (efficient coding).

Under plain data parallelism the rate of the whole batch, not the mean of the shares' rates::

    from dense2conv.parallel.collectives import GroupAxis
    from dense2conv.shapes import Layout

    layout = Layout(samples=GroupAxis(dist.group.WORLD))
    model = DistributedDataParallel(network)
    for x in loader:  # own share of the batch, (m/dp, D)
        loss = -coding_rate(on_sphere(model(x)), 0.5, layout)
        # Each process has the gradient for its own samples; DDP takes the mean, this is the sum.
        (loss * dist.get_world_size()).backward()
        optimizer.step()

With features sharded (tensor parallel) every process holds some columns of Z, and of the weights::

    layout = Layout(features=GroupAxis(tp_group))
    z = F.linear(x, own_rows_of_weight)  # (m, d/tp)
    loss = -coding_rate(on_sphere(z, layout), 0.5, layout)
    loss.backward()  # the exact gradient of the own rows, nothing to be added
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dense2conv.objectives.checks import require_positive
from dense2conv.objectives.logdet import logdet_i_plus
from dense2conv.objectives.sums import global_shape, shared, total
from dense2conv.shapes import SINGLE, Axis, InputError, Layout


def coding_rate(
    features: Tensor,
    epsilon_squared: float,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    num_features: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """R(Z) = ½ logdet(I + d/(m ε²) ZᵀZ) in nats: the rate of MCR² (Yu et al. 2020).

    Args:
        features: (m, d) with samples as rows, or this process's block of it.
        epsilon_squared: ε², the distortion.
        layout, num_samples, num_features, name: see ``logdet_i_plus``.
    """
    require_positive(epsilon_squared=epsilon_squared)
    m, d = global_shape(features, layout, num_samples, num_features)
    return 0.5 * logdet_i_plus(features, d / (m * epsilon_squared), layout, m, d, name)


def gaussian_information(
    features: Tensor,
    noise_variance: float,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    num_features: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """R(Z) = ½ logdet(I + ZᵀZ/(m σ²)) in nats: what Gaussian features tell of their input.

    Args:
        features: (m, d) with samples as rows, or this process's block of it.
        noise_variance: σ² of the noise at the output; σ² = ε²/d makes it the coding rate.
        layout, num_samples, num_features, name: see ``logdet_i_plus``.
    """
    require_positive(noise_variance=noise_variance)
    m, d = global_shape(features, layout, num_samples, num_features)
    return 0.5 * logdet_i_plus(features, 1 / (m * noise_variance), layout, m, d, name)


def on_sphere(features: Tensor, layout: Layout = SINGLE) -> Tensor:
    """Every sample (a row of Z) over its norm; a zero sample stays zero."""
    squares = total(features.square().sum(1, keepdim=True), layout.features)  # (m/dp, 1)
    squares = shared(squares, layout.features)
    tiny = torch.finfo(squares.dtype).tiny
    return features * torch.where(squares > 0, squares, 1).clamp(min=tiny).rsqrt()


def limit_power(features: Tensor, power: float, layout: Layout = SINGLE) -> Tensor:
    """Features scaled down, all alike, so that E‖z‖² over the whole batch is at most ``power``."""
    require_positive(power=power)
    m, _ = global_shape(features, layout)
    axes = (layout.samples, layout.features)
    mean = shared(total(features.square().sum(), *axes) / m, *axes)
    return features * (power / mean.clamp(min=power)).sqrt()


class CodingRate(nn.Module):
    """−R(Z), to be minimised, of features bounded in one of three ways.

    Args:
        epsilon_squared: ε², the distortion.
        bound: ``sphere``: every sample over its norm (MCR²); ``power``: E‖z‖² ≤ d; ``none``.
        layout: how the features are spread.
        batch_scope: ``global``: the rate of the whole batch. ``local``: of this process's samples
            alone, whose mean over processes is *another* objective, with no traffic over them.
        name: whose features these are, for error messages.
    """

    def __init__(
        self,
        epsilon_squared: float = 0.5,
        bound: Literal["sphere", "power", "none"] = "sphere",
        layout: Layout = SINGLE,
        batch_scope: Literal["global", "local"] = "global",
        name: str = "the layer",
    ) -> None:
        super().__init__()
        if bound not in ("sphere", "power", "none"):
            raise InputError(f"bound={bound!r} is unknown; use sphere, power or none")
        self.epsilon_squared, self.bound, self.name = epsilon_squared, bound, name
        self.layout = scoped(layout, batch_scope)

    def bounded(self, features: Tensor) -> Tensor:
        """The features whose rate is taken."""
        if self.bound == "sphere":
            return on_sphere(features, self.layout)
        if self.bound == "power":
            _, d = global_shape(features, self.layout)
            return limit_power(features, d, self.layout)
        return features

    def forward(self, features: Tensor) -> Tensor:
        z = self.bounded(features)
        return -coding_rate(z, self.epsilon_squared, self.layout, name=self.name)


def scoped(layout: Layout, batch_scope: str) -> Layout:
    """The layout of the whole batch, or, for ``local``, of each process's own samples."""
    if batch_scope not in ("global", "local"):
        raise InputError(f"batch_scope={batch_scope!r} is unknown; use global or local")
    return layout if batch_scope == "global" else Layout(Axis(), layout.features)
