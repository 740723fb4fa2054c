"""Independent components: InfoMax ICA of a square basis, RICA of an overcomplete one.

A row of W is the filter of one unit and z = xWᵀ what the units show. The covariance alone cannot
tell a whitening from its rotations; a super-Gaussian density can: independent outputs fit it best.
Rows of W are spread over ``layout.features`` (tp), samples over ``layout.samples`` (dp).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense2conv.objectives.checks import require_finite
from dense2conv.objectives.precision import in_full
from dense2conv.objectives.sums import global_shape, joined, shared, total
from dense2conv.shapes import SINGLE, InputError, Layout

_Elementwise = Callable[[Tensor], Tensor]


def _log_logistic_density(z: Tensor) -> Tensor:
    # log σ(z) + log σ(−z): neither overflows, and unlike |z| both are smooth at 0.
    return F.logsigmoid(z) + F.logsigmoid(-z)


# g: log g′(z), and the score φ(z) = −d/dz log g′(z).
_SQUASHING: dict[str, tuple[_Elementwise, _Elementwise]] = {
    "logistic": (_log_logistic_density, lambda z: torch.tanh(z / 2)),
    "tanh": (lambda z: _log_logistic_density(2 * z) + math.log(4), lambda z: 2 * torch.tanh(z)),
}


def infomax_loss(
    features: Tensor,
    weight: Tensor,
    nonlinearity: str = "logistic",
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    num_features: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """−log|det W| − E Σ_i log g′(z_i) in nats, to be minimised; E is the mean over samples.

    It is H(x) − H(g(z)): the least loss is the most entropy behind the squashing g. With the
    logistic, g′ is a density and the loss the mean negative log-likelihood of x.

        logistic   g = σ      log g′(z) = log σ(z) + log σ(−z)
        tanh       g = tanh   log g′(z) = −2 log cosh z

    tanh z = 2σ(2z) − 1: the loss of tanh at W is that of the logistic at 2W, less d log 2. Both
    find the same components, at two scales.

    Args:
        features: z = xWᵀ (m/dp, d/tp), the block held here, without a bias.
        weight: W (d/tp, D), own rows, with D = d. Every process gathers it in fp64: D² numbers.
        nonlinearity: g, "logistic" or "tanh".
        layout: how the features are spread.
        num_samples, num_features: m and d, where the caller knows them; otherwise they are summed.
        name: whose features these are, for error messages.

    Returns:
        A scalar, the same on every process, in the features' precision, at least fp32. Its
        gradient is that of the whole batch: with respect to ``features`` own block, with respect
        to ``weight`` own rows of −W⁻ᵀ, on every process of dp. Where gradients of W are summed
        over dp afterwards, all but one process of dp hand in ``weight.detach()``.

    Raises:
        InputError: W is not square, or singular; ``nonlinearity`` is unknown.
        ValueError: the features or the weights hold NaN or Inf.

    Source: Bell & Sejnowski 1995, An information-maximization approach to blind separation and
    blind deconvolution.
    """
    log_density, _ = _squashing(nonlinearity)
    z, w = in_full(features, weight)
    m, d = _complete_shape(z, w, layout, num_samples, num_features, name)
    log_volume = torch.linalg.slogdet(joined(w, layout.features, d).double()).logabsdet
    if bool(torch.isneginf(log_volume)):
        raise InputError(f"the weights of {name} are singular; start from an invertible matrix")
    log_densities = log_density(z).sum(dtype=torch.float64)
    mean = total(log_densities, layout.samples, layout.features) / m
    return require_finite(-log_volume - mean, name).to(z.dtype)


@torch.no_grad()
def infomax_natural_gradient(
    features: Tensor,
    weight: Tensor,
    nonlinearity: str = "logistic",
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    num_features: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """(I − φ(Z)ᵀZ/m) W: the natural gradient of −``infomax_loss``, a direction of *ascent*.

    It is the ordinary gradient times WᵀW, without the inverse of W: φ(z) = tanh(z/2) for the
    logistic, 2 tanh z for tanh. Its path does not depend on how the sources were mixed, so nothing
    need be whitened; but it may diverge unless it starts with outputs of order 1. No d×d matrix is
    made: φ(Z)ᵀ(ZW) goes through ZW, (m/dp, D), one sum over tp.

    Args: as of ``infomax_loss``.

    Returns:
        (d/tp, D), own rows, of the whole batch: it is summed over dp already. In the weights'
        precision, not differentiable.

    Raises:
        InputError: W is not square; ``nonlinearity`` is unknown.
        ValueError: the features or the weights hold NaN or Inf.

    Source: Amari, Cichocki & Yang 1996, A new learning algorithm for blind signal separation.
    """
    _, score = _squashing(nonlinearity)
    z, w = in_full(features, weight)
    m, _ = _complete_shape(z, w, layout, num_samples, num_features, name)
    zw = layout.features.sum(z @ w)  # (m/dp, D)
    require_finite(layout.samples.sum(zw.sum(dtype=torch.float64)), name)
    return (w - layout.samples.sum(score(z).mT @ zw) / m).to(weight.dtype)  # (d/tp, D)


class InfoMaxICA(nn.Module):
    """``infomax_loss`` as a module, to be minimised over a square layer.

    A natural-gradient step on ``layer = nn.Linear(D, D, bias=False)``, with plain SGD:

        layer.weight.grad = -infomax_natural_gradient(layer(x), layer.weight)
        optimizer.step()
    """

    def __init__(self, nonlinearity: str = "logistic") -> None:
        super().__init__()
        _squashing(nonlinearity)
        self.nonlinearity = nonlinearity

    def forward(
        self,
        features: Tensor,
        weight: Tensor,
        layout: Layout = SINGLE,
        num_samples: int | None = None,
        num_features: int | None = None,
        name: str = "the layer",
    ) -> Tensor:
        """See ``infomax_loss``."""
        return infomax_loss(
            features, weight, self.nonlinearity, layout, num_samples, num_features, name
        )


def rica_loss(
    inputs: Tensor,
    weight: Tensor,
    reconstruction: float = 1.0,
    smoothing: float = 0.01,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """E[λ‖WᵀWx − x‖² + Σ_i √(z_i² + ε)], z = Wx, to be minimised; E is the mean over samples.

    The reconstruction cost takes the place of ICA's orthonormal W, so d may exceed D. On whitened
    inputs it holds W to a tight frame, WᵀW = I: whiten them first. Where d > D and the norms of
    rows are free, d − D rows die, as one complete basis costs least: ``equal_norm_rows``.

    Args:
        inputs: x (m/dp, D), own samples, whole in D.
        weight: W (d/tp, D), own rows.
        reconstruction: λ, the price of the error.
        smoothing: ε > 0, in the units of z².
        layout: how samples and rows of W are spread.
        num_samples: m, where the caller knows it; otherwise it is summed.
        name: whose inputs these are, for error messages.

    Returns:
        A scalar, the same on every process, in the inputs' precision, at least fp32. The gradients
        of ``inputs`` and ``weight`` are those of the whole batch: summed over tp and dp already.

    Raises:
        InputError: x and W differ in D; λ < 0 or ε ≤ 0.
        ValueError: the inputs or the weights hold NaN or Inf.

    Source: Le, Karpenko, Ngiam & Ng 2011, ICA with reconstruction cost for efficient overcomplete
    feature learning.
    """
    _check_prices(reconstruction, smoothing)
    if inputs.ndim != 2 or weight.ndim != 2 or inputs.shape[1] != weight.shape[1]:
        raise InputError(
            f"inputs {tuple(inputs.shape)} and weights {tuple(weight.shape)} of {name} do not fit; "
            "use (m, D) and (d, D)"
        )
    x, w = in_full(inputs, weight)
    m, _ = global_shape(x, Layout(samples=layout.samples), num_samples)
    rows = shared(w, layout.samples)
    z = shared(x, layout.features) @ rows.mT  # (m/dp, d/tp)
    error = total(z @ rows, layout.features) - x  # (m/dp, D)
    squares = error.square().sum(dtype=torch.float64)
    magnitudes = (z.square() + smoothing).sqrt().sum(dtype=torch.float64)
    cost = reconstruction * squares + total(magnitudes, layout.features)
    return require_finite(total(cost, layout.samples) / m, name).to(x.dtype)


def equal_norm_rows(
    weight: Tensor, layout: Layout = SINGLE, num_features: int | None = None
) -> Tensor:
    """W (d/tp, D), every row scaled to the norm √min(1, D/d) that it has in a tight frame.

    ``rica_loss(x, equal_norm_rows(W))`` keeps all of an overcomplete basis alive.

    Args:
        weight: W (d/tp, D), own rows.
        layout: how the rows are spread.
        num_features: d, where the caller knows it; otherwise it is summed.
    """
    inputs, d = global_shape(weight.mT, Layout(features=layout.features), None, num_features)
    return F.normalize(weight, dim=1) * min(1.0, inputs / d) ** 0.5


class RICA(nn.Module):
    """``rica_loss`` as a module, to be minimised."""

    def __init__(self, reconstruction: float = 1.0, smoothing: float = 0.01) -> None:
        super().__init__()
        _check_prices(reconstruction, smoothing)
        self.reconstruction, self.smoothing = reconstruction, smoothing

    def forward(
        self,
        inputs: Tensor,
        weight: Tensor,
        layout: Layout = SINGLE,
        num_samples: int | None = None,
        name: str = "the layer",
    ) -> Tensor:
        """See ``rica_loss``."""
        return rica_loss(
            inputs, weight, self.reconstruction, self.smoothing, layout, num_samples, name
        )


def _squashing(nonlinearity: str) -> tuple[_Elementwise, _Elementwise]:
    if nonlinearity not in _SQUASHING:
        raise InputError(f"nonlinearity={nonlinearity!r} is unknown; use {' or '.join(_SQUASHING)}")
    return _SQUASHING[nonlinearity]


def _check_prices(reconstruction: float, smoothing: float) -> None:
    if not reconstruction >= 0:
        raise InputError(f"reconstruction={reconstruction}; use 0 or more")
    if not smoothing > 0:
        raise InputError(f"smoothing={smoothing}; use a positive number")


def _complete_shape(
    features: Tensor,
    weight: Tensor,
    layout: Layout,
    num_samples: int | None,
    num_features: int | None,
    name: str,
) -> tuple[int, int]:
    """(m, d) where W is square."""
    m, d = global_shape(features, layout, num_samples, num_features)
    if weight.shape != (features.shape[1], d):
        raise InputError(
            f"{d} features of {name}, {features.shape[1]} held here, and weights "
            f"{tuple(weight.shape)}: ICA needs as many units as inputs; use rica_loss for more"
        )
    return m, d
