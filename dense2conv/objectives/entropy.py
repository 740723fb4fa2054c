"""Entropies of features, and the information that units share: Gaussian, and free of any model.

    m   samples, spread over ``layout.samples`` (dp)     d   units, over ``layout.features`` (tp)

All are differential entropies in nats: h(az) = h(z) + log|a|, and -inf for what repeats itself. The
Gaussian entropy is the largest that features of that covariance can have; the others see the
shape of the distribution. The statistics are fp64 inside, and come back in the features' precision,
at least fp32.
"""

from __future__ import annotations

import math

import torch
from scipy.special import digamma
from torch import Tensor, nn

from dense2conv.objectives.checks import require_at_least, require_finite
from dense2conv.objectives.gram import small_gram
from dense2conv.objectives.logdet import logdet_i_plus
from dense2conv.objectives.precision import at_least_fp32
from dense2conv.objectives.sums import global_shape, joined, mean_over_samples, own, shared, total
from dense2conv.shapes import SINGLE, InputError, Layout

_LOG_2_PI_E = math.log(2 * math.pi * math.e)
_EPS = torch.finfo(torch.float64).eps
_CHUNK = 2**22  # numbers a temporary may hold: 32 MiB


def gaussian_entropy(
    features: Tensor,
    noise_variance: float = 0.0,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    num_features: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """h(Z) = ½ logdet(2πe (Σ + σ²I)) of the features' covariance Σ = E zzᵀ − E z E zᵀ.

    With noise it is d/2 log(2πe σ²) + ½ logdet(I + ZᵀZ/(mσ²)) of centred Z, on the small side.

    Args:
        features: (m/dp, d/tp), own block.
        noise_variance: σ² of Gaussian noise added to every unit; without it Σ must be regular,
            which takes more samples than units.
        layout, num_samples, num_features, name: see ``logdet_i_plus``.

    Returns:
        A scalar in nats, the same on every process, differentiable twice.

    Raises:
        InputError: σ² is negative, or it is 0 and Σ is singular.
        ValueError: the features hold NaN or Inf.
    """
    return _gaussian_entropies(features, noise_variance, layout, num_samples, num_features, name)[0]


def gaussian_total_correlation(
    features: Tensor,
    noise_variance: float = 0.0,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    num_features: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """Σ_i h(z_i) − h(Z) = −½ logdet of the correlation matrix: 0 for uncorrelated units alone.

    Arguments, return and errors as in :func:`gaussian_entropy`.
    """
    joint, marginals = _gaussian_entropies(
        features, noise_variance, layout, num_samples, num_features, name
    )
    return marginals - joint


class GaussianEntropy(nn.Module):
    """:func:`gaussian_entropy` for one σ²: an entropy, to be maximised."""

    def __init__(self, noise_variance: float = 0.0) -> None:
        require_at_least(0, noise_variance=noise_variance)
        super().__init__()
        self.noise_variance = noise_variance

    def forward(
        self,
        features: Tensor,
        layout: Layout = SINGLE,
        num_samples: int | None = None,
        num_features: int | None = None,
        name: str = "the layer",
    ) -> Tensor:
        """A scalar in nats."""
        return gaussian_entropy(
            features, self.noise_variance, layout, num_samples, num_features, name
        )


class GaussianTotalCorrelation(nn.Module):
    """:func:`gaussian_total_correlation` for one σ², to be minimised."""

    def __init__(self, noise_variance: float = 0.0) -> None:
        require_at_least(0, noise_variance=noise_variance)
        super().__init__()
        self.noise_variance = noise_variance

    def forward(
        self,
        features: Tensor,
        layout: Layout = SINGLE,
        num_samples: int | None = None,
        num_features: int | None = None,
        name: str = "the layer",
    ) -> Tensor:
        """A scalar in nats."""
        return gaussian_total_correlation(
            features, self.noise_variance, layout, num_samples, num_features, name
        )


def marginal_entropies(
    features: Tensor,
    spacing: int | None = None,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """Each unit's own entropy, from the gaps between its sorted values z_(1) ≤ … ≤ z_(m).

    h = mean_i log(z_(i+s) − z_(i)) + ψ(m+1) − ψ(s), i = 1 … m−s. In log((m+1)/s)'s place the digamma
    functions leave no bias for a uniform density. Every process holds all samples of its own
    units: (m, d/tp) numbers, twice.

    Args:
        features: (m/dp, d/tp), own block.
        spacing: s, from 1 to m−1; m^⅓ by default. A larger one has less variance and more bias.
        layout, num_samples, name: see ``logdet_i_plus``.

    Returns:
        (d/tp,) nats, the same along dp; -inf, without a gradient, for a unit that gives one value
        more than s times, such as a dead one. Differentiable twice elsewhere.

    Raises:
        InputError: s is not from 1 to m−1.
        ValueError: the features hold NaN or Inf.

    Source:
        Vasicek (1976), in the form of Learned-Miller & Fisher (2003).
    """
    m, _ = global_shape(features, Layout(samples=layout.samples), num_samples)
    spacing = round(m ** (1 / 3)) if spacing is None else spacing
    if not 1 <= spacing < m:
        raise InputError(f"spacing={spacing} with {m} samples; use 2 or more and 1 … {m - 1}")
    _require_finite_features(features, layout, name)
    values = joined(features.double(), layout.samples, m).sort(0).values  # (m, d/tp)
    gaps = values[spacing:] - values[:-spacing]  # (m - s, d/tp)
    entropies = gaps.log().mean(0) + float(digamma(m + 1) - digamma(spacing))  # (d/tp,)
    return entropies.to(at_least_fp32(features.dtype))


def knn_entropy(
    features: Tensor,
    neighbours: int = 3,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    num_features: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """The joint entropy of all units, from each sample's distance ρ to its k-th nearest neighbour.

    h = ψ(m) − ψ(k) + log V_d + d E log ρ + ½ logdet Σ, with V_d the volume of the unit ball and ρ
    taken in whitened features: their balls fit the density, and h(Az + b) = h(z) + log|det A| holds
    exactly. Squared distances are summed over tp, a few samples at a time; every process holds
    (m, d/tp), (m/dp, d) and (d, d) numbers, and a temporary of 32 MiB (or m numbers). The bias grows
    with d: trust it for few dimensions.

    Args:
        features: (m/dp, d/tp), own block.
        neighbours: k, from 1 to m−1; a larger one has less variance and more bias.
        layout, num_samples, num_features, name: see ``logdet_i_plus``.

    Returns:
        A scalar in nats, the same on every process, differentiable twice (who is whose neighbour
        is constant).

    Raises:
        InputError: k is not from 1 to m−1, Σ is singular, or more than k samples coincide.
        ValueError: the features hold NaN or Inf.

    Source:
        Kozachenko & Leonenko (1987), in the form of Kraskov, Stögbauer & Grassberger (2004).
    """
    m, d = global_shape(features, layout, num_samples, num_features)
    if not 1 <= neighbours < m:
        raise InputError(f"neighbours={neighbours} with {m} samples; use 2 or more and 1 … {m - 1}")
    deviations, _ = _deviations(features, layout, m, name)
    factor = _cholesky_covariance(deviations, layout, m, d, name)
    nearest = _neighbours(deviations.detach(), factor.detach(), neighbours, layout, m)  # (m/dp,)
    whole = shared(joined(deviations, layout.samples, m), layout.samples)  # (m, d/tp)
    # Subtracted before they are whitened, so that copies are at distance 0 exactly.
    steps = joined(deviations - whole[nearest], layout.features, d, 1)  # (m/dp, d)
    steps = _whitened(steps, shared(factor, layout.samples))
    squares = steps.square().sum(1)  # (m/dp,)
    mean_log_radius = total(squares.log().sum(), layout.samples) / (2 * m)
    log_volume = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    white = float(digamma(m) - digamma(neighbours)) + log_volume + d * mean_log_radius
    entropy = white + factor.diagonal().log().sum()
    return _require_continuous(entropy, name).to(at_least_fp32(features.dtype))


def total_correlation(
    features: Tensor,
    neighbours: int = 3,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    num_features: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """Σ_i h(z_i) − h(Z), free of any model: 0 for independent units alone, but for its error.

    Both entropies are estimates, by :func:`marginal_entropies` and :func:`knn_entropy`, whose
    arguments, limits and errors it has; k is the spacing too, so that their biases are of a kind.
    """
    joint = knn_entropy(features, neighbours, layout, num_samples, num_features, name)
    own_units = marginal_entropies(features, neighbours, layout, num_samples, name)  # (d/tp,)
    return _require_continuous(total(own_units.sum(), layout.features) - joint, name)


def gaussian_mutual_information(
    features: Tensor,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    num_features: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """What each pair of units tells of each other by its correlation alone: −½ log(1 − ρ²).

    The samples of all units are gathered over tp a few at a time: a temporary of 32 MiB (or d
    numbers) beside a few copies of the result, where no gradient is asked for.

    Args:
        features: (m/dp, d/tp), own block.
        layout, num_samples, num_features, name: see ``logdet_i_plus``.

    Returns:
        (d/tp, d) nats, own units' rows, the same along dp: +inf of a unit with itself, 0 for a
        constant one. Differentiable twice where no two units are equal.

    Raises:
        ValueError: the features hold NaN or Inf.
    """
    m, d = global_shape(features, layout, num_samples, num_features)
    deviations, variance = _deviations(features, layout, m, name)
    varies = variance > 0  # (d/tp,)
    scale = variance.where(varies, 1).rsqrt()
    standardised = deviations * shared(scale, layout.samples)  # (m/dp, d/tp)
    products = standardised.new_zeros(standardised.shape[1], d)  # (d/tp, d)
    for rows in standardised.split(max(1, _CHUNK // d)):
        products = products + rows.mT @ shared(joined(rows, layout.features, d, 1), layout.features)
    correlation = total(products, layout.samples) / m
    units = torch.arange(d, device=features.device)
    itself = own(units, layout.features)[:, None] == units  # (d/tp, d)
    # Rounding may bring ρ² of two equal units past 1; the diagonal is kept out of the gradient.
    squares = correlation.square().clamp(max=1).masked_fill(itself, 0)
    information = -0.5 * torch.log1p(-squares)
    return information.masked_fill(itself & varies[:, None], math.inf).to(
        at_least_fp32(features.dtype)
    )


@torch.no_grad()
def binned_mutual_information(
    features: Tensor,
    num_bins: int | None = None,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    num_features: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """What each pair of units tells of each other by any dependence, from a joint histogram.

    I = H(bin_i) + H(bin_j) − H(bin_i, bin_j), each with Miller and Madow's correction. A unit's bins
    hold equally many of its samples, and equal values share one. Of the model-free estimators
    this one does all pairs at once, as products of indicators that add up exactly over any mesh,
    and it sees what a rank correlation cannot: z² beside z. Bins lose information: with 16 of
    them, Gaussian pairs with ρ = 0.5, 0.8, 0.95 show 95, 94 and 91 % of theirs.

    Args:
        features: (m/dp, d/tp), own block.
        num_bins: B, from 2 to 256; by default 16, or fewer to leave 20 samples for each of B² cells.
        layout, num_samples, num_features, name: see ``logdet_i_plus``.

    Returns:
        (d/tp, d) nats, own units' rows, the same along dp; the entropy H(bin_i) of a unit with
        itself, and about 0, of either sign, for independent units. Without a gradient. Memory: (m, d/tp)
        numbers twice, (m/dp, d) bytes, and temporaries of about 64 MiB.

    Raises:
        InputError: B is not from 2 to 256.
        ValueError: the features hold NaN or Inf.

    Source:
        Miller (1955).
    """
    m, d = global_shape(features, layout, num_samples, num_features)
    if num_bins is None:
        num_bins = min(max(2, round(math.sqrt(m / 20))), 16)
    if not 2 <= num_bins <= 256:
        raise InputError(f"num_bins={num_bins}; use 2 … 256")
    _require_finite_features(features, layout, name)
    bins = layout.features.gather(_quantile_bins(features, num_bins, layout, m), d, 1)  # (m/dp, d)
    own_units = layout.features.shard(d)
    block = max(1, 1024 // num_bins)  # units whose histograms are made at once
    information = [
        torch.cat([_pairwise(a, b, num_bins, layout, m) for b in bins.split(block, 1)], 1)
        for a in bins[:, own_units.start : own_units.stop].split(block, 1)
    ]
    return torch.cat(information).to(at_least_fp32(features.dtype))


def _gaussian_entropies(
    features: Tensor,
    noise_variance: float,
    layout: Layout,
    num_samples: int | None,
    num_features: int | None,
    name: str,
) -> tuple[Tensor, Tensor]:
    """The joint entropy, and the sum of all units' own: scalars."""
    require_at_least(0, noise_variance=noise_variance)
    m, d = global_shape(features, layout, num_samples, num_features)
    deviations, variance = _deviations(features, layout, m, name)
    if noise_variance > 0:
        z = deviations.to(at_least_fp32(features.dtype))
        logdet = logdet_i_plus(z, 1 / (m * noise_variance), layout, m, d, name)
        logdet = logdet.double() + d * math.log(noise_variance)
    else:
        factor = _cholesky_covariance(deviations, layout, m, d, name)
        logdet = 2 * factor.diagonal().log().sum()
    logs = total((variance + noise_variance).log().sum(), layout.features)
    joint, marginals = (0.5 * (d * _LOG_2_PI_E + value) for value in (logdet, logs))
    return joint.to(at_least_fp32(features.dtype)), marginals.to(at_least_fp32(features.dtype))


def _deviations(
    features: Tensor, layout: Layout, num_samples: int, name: str
) -> tuple[Tensor, Tensor]:
    """Features less their whole-batch means (m/dp, d/tp), and variances (d/tp,), in fp64."""
    z = features.double()
    mean = mean_over_samples(z, layout, num_samples)  # (d/tp,)
    deviations = z - shared(mean, layout.samples)
    variance = mean_over_samples(deviations.square(), layout, num_samples)  # (d/tp,)
    require_finite(total(variance.detach().sum(), layout.features), name)
    # A constant unit's deviations are the rounding of its mean, which may look like anything.
    constant = variance.sqrt() <= 64 * _EPS * mean.abs()
    return deviations.masked_fill(constant, 0), variance.masked_fill(constant, 0)


def _cholesky_covariance(
    deviations: Tensor, layout: Layout, num_samples: int, num_features: int, name: str
) -> Tensor:
    """The lower factor (d, d) of Σ, from centred features; an InputError where Σ is singular."""
    if num_features >= num_samples:
        raise InputError(
            f"{num_samples} samples of {name} do not span its {num_features} units; give more samples "
            "than units, or add noise (noise_variance > 0)"
        )
    covariance = small_gram(deviations, layout, num_samples, num_features) / num_samples  # (d, d)
    factor, info = torch.linalg.cholesky_ex(covariance)
    # A squared pivot is what a unit varies beside those before it.
    rounding = num_features * _EPS * covariance.diagonal()
    if bool(info) or bool((factor.diagonal().square() <= rounding).any()):
        raise InputError(
            f"the covariance of {name} is singular: a unit is constant, or a sum of others; drop such "
            "units, or add noise (noise_variance > 0)"
        )
    return factor


def _whitened(rows: Tensor, factor: Tensor) -> Tensor:
    """L⁻¹z of every row z: (m, d)."""
    return torch.linalg.solve_triangular(factor, rows.mT, upper=False).mT


@torch.no_grad()
def _neighbours(
    deviations: Tensor, factor: Tensor, neighbours: int, layout: Layout, num_samples: int
) -> Tensor:
    """Which of all samples is the k-th nearest to each own one, once whitened: (m/dp,)."""
    white = _whitened(joined(deviations, layout.features, factor.shape[0], 1), factor)
    white = joined(own(white, layout.features, 1), layout.samples, num_samples)  # (m, d/tp)
    own_rows = torch.arange(num_samples, device=white.device)  # (m,)
    own_rows = own(own_rows, layout.samples)  # (m/dp,)
    norms = white.square().sum(1)  # (m,)
    nearest = []
    for rows in own_rows.split(max(1, _CHUNK // num_samples)):
        # Squared distances less the own norm, which is one number a row.
        scores = layout.features.sum(norms - 2 * white[rows] @ white.mT)  # (chunk, m)
        scores.scatter_(1, rows[:, None], math.inf)
        nearest.append(scores.kthvalue(neighbours, 1).indices)
    return torch.cat(nearest)


def _quantile_bins(features: Tensor, num_bins: int, layout: Layout, num_samples: int) -> Tensor:
    """The bin of each own value among the whole batch's quantiles: (m/dp, d/tp) uint8."""
    z = features.to(at_least_fp32(features.dtype))
    ordered = layout.samples.gather(z, num_samples).sort(0).values  # (m, d/tp)
    first = torch.arange(1, num_bins, device=z.device) * num_samples // num_bins
    edges = ordered[first]  # (B - 1, d/tp)
    bins = torch.searchsorted(edges.mT.contiguous(), z.mT.contiguous(), right=True)
    return bins.mT.to(torch.uint8).contiguous()


def _pairwise(a: Tensor, b: Tensor, num_bins: int, layout: Layout, num_samples: int) -> Tensor:
    """Information (n_a, n_b) between two blocks of binned units (m/dp, n)."""
    cells = (a.shape[1] * num_bins, b.shape[1] * num_bins)
    counts = torch.zeros(cells, dtype=torch.float64, device=a.device)
    for rows_a, rows_b in zip(a.split(2048), b.split(2048), strict=True):
        counts += _indicators(rows_a, num_bins).mT @ _indicators(rows_b, num_bins)
    counts = layout.samples.sum(counts).view(a.shape[1], num_bins, b.shape[1], num_bins)
    joint = _miller_madow(counts.transpose(1, 2).flatten(2), num_samples)  # (n_a, n_b)
    own_a = _miller_madow(counts.sum(3).transpose(1, 2), num_samples)
    own_b = _miller_madow(counts.sum(1), num_samples)
    return own_a + own_b - joint


def _indicators(bins: Tensor, num_bins: int) -> Tensor:
    """(m, n) bins as (m, n B) zeros and ones; their products are exact in fp32."""
    return (bins[:, :, None] == torch.arange(num_bins, device=bins.device)).float().flatten(1)


def _miller_madow(counts: Tensor, num_samples: int) -> Tensor:
    """Entropy (…) of histograms (…, cells), with a half for each occupied cell but one, over m."""
    plug_in = torch.special.entr(counts / num_samples).sum(-1)
    return plug_in + ((counts > 0).double().sum(-1) - 1) / (2 * num_samples)


def _require_finite_features(features: Tensor, layout: Layout, name: str) -> None:
    require_finite(total(features.detach().double().sum(), layout.samples, layout.features), name)


def _require_continuous(entropy: Tensor, name: str) -> Tensor:
    """The entropy, or an error where it is that of samples which repeat one value."""
    if entropy.detach() == -math.inf:
        raise InputError(
            f"samples of {name} coincide, so their entropy is -inf; drop the copies and the dead units, "
            "or add a little noise"
        )
    return require_finite(entropy, name)
