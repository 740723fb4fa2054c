"""Entropies and informations against closed forms, slow oracles, and one process."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import digamma, xlogy
from scipy.stats import norm

from dense2conv.objectives import entropy
from dense2conv.objectives.entropy import (
    GaussianEntropy,
    GaussianTotalCorrelation,
    binned_mutual_information,
    gaussian_entropy,
    gaussian_mutual_information,
    gaussian_total_correlation,
    knn_entropy,
    marginal_entropies,
    total_correlation,
)
from dense2conv.objectives.sums import total
from dense2conv.parallel import ParallelConfig, open_mesh
from dense2conv.shapes import SINGLE, InputError
from tests.ranks import on_ranks

NORMAL = 0.5 * math.log(2 * math.pi * math.e)  # entropy of a standard normal variable
ALL = [
    gaussian_entropy,
    gaussian_total_correlation,
    knn_entropy,
    total_correlation,
    marginal_entropies,
    gaussian_mutual_information,
    binned_mutual_information,
]


def _normal(m, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, d, generator=generator, dtype=torch.float64)


def _mixing(d, seed=0):
    """Far from a rotation: its singular values are spread."""
    return _normal(d, d, seed) + 0.3 * torch.eye(d)


def _pair(rho, m, seed=0):
    x = _normal(m, 2, seed)
    return torch.stack([x[:, 0], rho * x[:, 0] + math.sqrt(1 - rho**2) * x[:, 1]], 1)


def _slow_covariance(z):
    return (z - z.mean(0)).T @ (z - z.mean(0)) / len(z)


def _slow_gaussian(z, noise_variance):
    """The joint entropy and the sum of the marginal ones, from 2πe(Σ + σ²I)."""
    noisy = _slow_covariance(z) + noise_variance * torch.eye(z.shape[1], dtype=z.dtype)
    scaled = 2 * math.pi * math.e * noisy
    return 0.5 * torch.logdet(scaled), 0.5 * scaled.diagonal().log().sum()


def _slow_knn(z, k):
    """Kozachenko and Leonenko in whitened features, from all distances."""
    m, d = z.shape
    eigenvalues, vectors = torch.linalg.eigh(_slow_covariance(z))
    white = z @ vectors @ torch.diag(eigenvalues.rsqrt())
    radii = [(white - row).square().sum(1).sort().values[k].sqrt() for row in white]
    volume = math.pi ** (d / 2) / math.gamma(d / 2 + 1)
    log_radius = sum(r.log() for r in radii) / m
    white_entropy = digamma(m) - digamma(k) + math.log(volume) + d * log_radius
    return white_entropy + 0.5 * eigenvalues.log().sum()


def _slow_marginals(z, spacing):
    entropies = []
    for unit in z.T:
        values = sorted(unit)
        gaps = [b - a for a, b in zip(values, values[spacing:], strict=False)]
        bias = digamma(len(z) + 1) - digamma(spacing)
        entropies.append(sum(gap.log() for gap in gaps) / len(gaps) + bias)
    return torch.stack(entropies)


def _slow_binned(z, num_bins):
    """Histograms, one pair of units at a time; an edge belongs to the bin above it."""
    m, d = z.shape
    bins = []
    for unit in z.T.tolist():
        edges = [sorted(unit)[i * m // num_bins] for i in range(1, num_bins)]
        bins.append([sum(value >= edge for edge in edges) for value in unit])

    def entropy(symbols):
        counts = [symbols.count(s) for s in set(symbols)]
        return sum(c / m * math.log(m / c) for c in counts) + (len(counts) - 1) / (2 * m)

    information = torch.zeros(d, d, dtype=torch.float64)
    for i, a in enumerate(bins):
        for j, b in enumerate(bins):
            information[i, j] = entropy(a) + entropy(b) - entropy(list(zip(a, b, strict=True)))
    return information


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 16),
    d=st.integers(1, 16),
    noise_variance=st.floats(1e-3, 1e2),
    seed=st.integers(0, 1000),
)
def test_gaussian_forms_are_their_formulas_on_either_side(m, d, noise_variance, seed):
    ours, slow = (_normal(m, d, seed).requires_grad_() for _ in range(2))
    joint = gaussian_entropy(ours, noise_variance)
    correlation = gaussian_total_correlation(ours, noise_variance)
    slow_joint, slow_marginals = _slow_gaussian(slow, noise_variance)
    torch.testing.assert_close(joint, slow_joint, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(correlation, slow_marginals - slow_joint, rtol=1e-9, atol=1e-9)
    (joint + 2 * correlation).backward()
    (2 * slow_marginals - slow_joint).backward()
    torch.testing.assert_close(ours.grad, slow.grad, rtol=1e-8, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(d=st.integers(1, 6), more=st.integers(2, 12), k=st.integers(1, 6), seed=st.integers(0, 1000))
def test_estimators_are_their_formulas(d, more, k, seed):
    m = d + more  # d + 1 samples are a simplex once whitened: all are each other's nearest
    k = min(k, m - 1)
    ours, slow = (_normal(m, d, seed).requires_grad_() for _ in range(2))
    for fast, reference in (
        (gaussian_entropy(ours), _slow_gaussian(slow, 0)[0]),
        (knn_entropy(ours, k), _slow_knn(slow, k)),
        (marginal_entropies(ours, k), _slow_marginals(slow, k)),
        (total_correlation(ours, k), _slow_marginals(slow, k).sum() - _slow_knn(slow, k)),
    ):
        torch.testing.assert_close(fast, reference, rtol=1e-8, atol=1e-8)
        (grad,), (slow_grad,) = (
            torch.autograd.grad(value.square().sum(), z, retain_graph=True)
            for value, z in ((fast, ours), (reference, slow))
        )
        torch.testing.assert_close(grad, slow_grad, rtol=1e-5, atol=1e-6 * slow_grad.abs().max())


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 30), d=st.integers(1, 5), num_bins=st.integers(2, 6), seed=st.integers(0, 1000)
)
def test_informations_are_their_formulas(m, d, num_bins, seed):
    z = _normal(m, d, seed)
    z[:, ::2] = z[:, ::2].round()  # many equal values
    ours = binned_mutual_information(z, num_bins)
    torch.testing.assert_close(ours, _slow_binned(z, num_bins), rtol=1e-10, atol=1e-12)
    if m > 2:
        z = _normal(m, d, seed)
        correlation = torch.from_numpy(np.atleast_2d(np.corrcoef(z.T.numpy())))
        expected = -0.5 * (1 - correlation.square()).log()
        expected.fill_diagonal_(math.inf)
        torch.testing.assert_close(gaussian_mutual_information(z), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("twice", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_they_can_be_differentiated_twice(twice):
    z = _normal(7, 3, 4).requires_grad_()
    off_diagonal = ~torch.eye(3, dtype=torch.bool)
    for value in (
        GaussianEntropy(),
        GaussianEntropy(0.5),
        GaussianTotalCorrelation(),
        GaussianTotalCorrelation(0.5),
        knn_entropy,
        marginal_entropies,
        total_correlation,
        lambda z: gaussian_mutual_information(z)[off_diagonal],
    ):
        assert twice(value, [z])
    wide = _normal(3, 5).requires_grad_()
    assert twice(GaussianEntropy(0.5), [wide])


def test_small_pieces_give_the_same(monkeypatch):
    z = _normal(500, 4)
    whole = [estimate(z) for estimate in ALL]
    monkeypatch.setattr(entropy, "_CHUNK", 900)
    for estimate, expected in zip(ALL, whole, strict=True):
        torch.testing.assert_close(estimate(z), expected)
    # Blocks of units: 300 units with 16 bins are made 64 at a time.
    wide = _normal(40, 300)
    some = binned_mutual_information(wide[:, 250:], 16)
    torch.testing.assert_close(binned_mutual_information(wide, 16)[250:, 250:], some)


# Inverse distribution functions, with their entropies.
DISTRIBUTIONS = {
    "uniform": (lambda u: 3 * u - 1, math.log(3)),
    "normal": (torch.special.ndtri, NORMAL),
    "exponential": (lambda u: -torch.log1p(-u), 1.0),
    "laplace": (
        lambda u: torch.where(u < 0.5, (2 * u).log(), -(2 - 2 * u).log()),
        1 + math.log(2),
    ),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_entropies_of_known_distributions(name):
    inverse, expected = DISTRIBUTIONS[name]
    u = torch.rand(20_000, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = inverse(u)
    own = marginal_entropies(z)
    assert float(own.mean()) == pytest.approx(expected, abs=0.012)
    assert float((own - expected).abs().max()) < 0.04
    assert float(knn_entropy(z[:4000, :1])) == pytest.approx(expected, abs=0.05)
    # Two independent units: the joint entropy is the sum.
    assert float(knn_entropy(z[:4000, 1:3])) == pytest.approx(2 * expected, abs=0.08)
    # No density of that variance has more entropy than the normal one.
    most = float(gaussian_entropy(z[:, :1]))
    if name == "normal":
        assert most == pytest.approx(expected, abs=0.02)
    else:
        assert most > expected + 0.05


def test_spacings_of_a_uniform_density_have_no_bias():
    u = torch.rand(10, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for spacing in (1, 3, 9):
        own = marginal_entropies(u, spacing)
        assert float(own.mean()) == pytest.approx(0, abs=4 * float(own.std()) / math.sqrt(20_000))


@pytest.mark.parametrize("d", [2, 5, 10])
def test_joint_entropy_and_total_correlation_of_a_correlated_normal(d):
    mixing = _mixing(d)
    z = _normal(4000, d, 1) @ mixing.T
    joint = d * NORMAL + float(torch.linalg.slogdet(mixing).logabsdet)
    marginals = d * NORMAL + float((mixing @ mixing.T).diagonal().log().sum() / 2)
    assert float(gaussian_entropy(z)) == pytest.approx(joint, abs=0.05)
    assert float(knn_entropy(z)) == pytest.approx(joint, abs=0.1)
    assert float(gaussian_total_correlation(z)) == pytest.approx(marginals - joint, abs=0.05)
    assert float(total_correlation(z)) == pytest.approx(marginals - joint, abs=0.15)
    assert marginals - joint > 0.5


def test_total_correlation_sees_what_the_gaussian_form_cannot():
    z = _normal(3000, 1)
    other = _normal(3000, 1, 1)
    dependent = torch.cat([z, z.square() + 0.1 * other], 1)
    independent = torch.cat([z, other], 1)
    assert float(gaussian_total_correlation(dependent)) < 0.01
    assert float(total_correlation(dependent)) > 1
    assert float(total_correlation(independent)) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("estimate", [gaussian_entropy, knn_entropy])
def test_joint_entropy_under_linear_maps(estimate):
    z = _normal(400, 4, 2).exp()
    mixing = _mixing(4, 5)
    change = estimate(z @ mixing.T + 7) - estimate(z)
    torch.testing.assert_close(change, torch.linalg.slogdet(mixing).logabsdet, rtol=0, atol=1e-9)


@pytest.mark.parametrize("a", [1e-3, -0.5, 40.0])
def test_scale_and_shift_behave_as_they_must(a):
    z = _normal(400, 3) @ _mixing(3).T
    scaled = a * z + 5
    own = marginal_entropies(z)
    torch.testing.assert_close(marginal_entropies(scaled), own + math.log(abs(a)))
    for joint in (gaussian_entropy, knn_entropy):
        torch.testing.assert_close(joint(scaled), joint(z) + 3 * math.log(abs(a)))
    for invariant in (gaussian_total_correlation, total_correlation, gaussian_mutual_information):
        torch.testing.assert_close(invariant(scaled), invariant(z))
    # Bins see the order alone: any rising map leaves them as they are.
    binned = binned_mutual_information(z)
    assert torch.equal(binned_mutual_information(z.exp() * abs(a)), binned)


def _binned_normal_information(rho, num_bins):
    """What equally filled bins leave of a normal pair's information, by integration."""
    edges = norm.ppf(np.arange(num_bins + 1) / num_bins)
    u = (np.arange(200_000) + 0.5) / 200_000
    x = norm.ppf(u)[:, None]
    below = norm.cdf((edges - rho * x) / math.sqrt(1 - rho**2))  # P(y ≤ edge | x)
    joint = np.diff(below).reshape(num_bins, -1, num_bins).mean(1) / num_bins
    return float(xlogy(joint, joint * num_bins**2).sum())


@pytest.mark.parametrize(("rho", "kept"), [(0.5, 0.95), (-0.8, 0.94), (0.95, 0.91)])
def test_information_of_a_normal_pair(rho, kept):
    z = _pair(rho, 100_000)
    expected = -0.5 * math.log(1 - rho**2)
    assert float(gaussian_mutual_information(z)[0, 1]) == pytest.approx(expected, abs=0.01)
    binned = _binned_normal_information(rho, 16)
    assert binned / expected == pytest.approx(kept, abs=0.005)
    assert float(binned_mutual_information(z)[1, 0]) == pytest.approx(binned, abs=0.01)


def test_independent_units_share_nothing():
    z = _normal(10_000, 20)
    apart = ~torch.eye(20, dtype=torch.bool)
    gaussian, binned = gaussian_mutual_information(z)[apart], binned_mutual_information(z)[apart]
    assert float(gaussian.mean()) < 1e-4  # 1/(2m) on average
    # Without the correction the mean would be (B-1)²/(2m) = 0.011.
    assert float(binned.mean()) == pytest.approx(0, abs=2e-4)
    assert float(binned.abs().max()) < 5e-3


def test_bins_see_a_dependence_without_correlation():
    z = _normal(20_000, 1)
    pair = torch.cat([z, z.square()], 1)
    assert float(gaussian_mutual_information(pair)[0, 1]) < 1e-3
    # Every bin of z² lies over two of z. The sample's median is not quite 0, so some values stray.
    assert math.log(8) - 0.2 < float(binned_mutual_information(pair)[0, 1]) < math.log(8)


def test_units_that_are_constant_or_equal():
    z = _normal(600, 3)
    z[:, 1] = 0.3  # its mean is rounded
    z[:, 2] = z[:, 0]
    own = marginal_entropies(z)
    assert own[1] == -math.inf
    assert own[[0, 2]].isfinite().all()
    gaussian, binned = gaussian_mutual_information(z), binned_mutual_information(z)
    for information in (gaussian, binned):
        assert (information[1] == 0).all()
        assert (information[:, 1] == 0).all()
    assert gaussian[0, 0] == gaussian[2, 2] == math.inf
    assert gaussian[0, 2] > 15
    num_bins = 5  # of 600 samples by default, equally filled
    expected = math.log(num_bins) + (num_bins - 1) / 1200
    torch.testing.assert_close(binned[0, [0, 2]], torch.full_like(binned[0, :2], expected))
    assert gaussian_entropy(z, 0.01).isfinite()


@pytest.mark.parametrize(
    "z",
    [
        torch.cat([_normal(9, 1), torch.full((9, 1), 0.3, dtype=torch.float64)], 1),
        _normal(9, 2)[:, [0, 1, 0]],
        _normal(9, 2) @ _normal(2, 3),
        _normal(3, 3),
        _normal(1, 1),
    ],
    ids=["constant", "equal", "sum of others", "m = d", "m = 1"],
)
def test_singular_covariances_are_refused_with_a_remedy(z):
    with pytest.raises(InputError, match="noise_variance > 0"):
        gaussian_entropy(z)
    assert gaussian_entropy(z, 0.1).isfinite()


@pytest.mark.parametrize("estimate", [knn_entropy, total_correlation])
def test_copies_are_refused_by_joint_estimates(estimate):
    z = _normal(40, 3)
    z[7:11] = z[7]  # three neighbours at distance 0
    with pytest.raises(InputError, match="coincide"):
        estimate(z)
    assert estimate(z, 4).isfinite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("estimate", ALL)
def test_nan_and_inf_are_named_not_passed_on(estimate, bad):
    z = _normal(20, 3)
    z[2, 1] = bad
    with pytest.raises(ValueError, match=r"layer 7.*NaN or Inf"):
        estimate(z, name="layer 7")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimate", ALL)
def test_half_precision_is_computed_in_full(estimate, dtype):
    z = (_normal(60, 3) @ _mixing(3).T + 3).to(dtype)
    values = estimate(z)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), estimate(z.double()), rtol=1e-6, atol=1e-6)


def test_a_large_mean_costs_no_digits():
    z = 1e-2 * _normal(2000, 8).float() + 1000
    expected = gaussian_entropy(z.double(), 1e-6)
    torch.testing.assert_close(gaussian_entropy(z, 1e-6).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("estimate", "options", "named"),
    [
        (gaussian_entropy, {"noise_variance": -0.1}, "noise_variance=-0.1"),
        (gaussian_total_correlation, {"noise_variance": math.nan}, "noise_variance=nan"),
        (knn_entropy, {"neighbours": 0}, "neighbours=0 with 9 samples"),
        (knn_entropy, {"neighbours": 9}, "use .* 1 … 8"),
        (marginal_entropies, {"spacing": 9}, "spacing=9 with 9 samples"),
        (binned_mutual_information, {"num_bins": 1}, "num_bins=1"),
        (binned_mutual_information, {"num_bins": 257}, "use 2 … 256"),
    ],
)
def test_mistakes_name_the_value_and_the_remedy(estimate, options, named):
    with pytest.raises(InputError, match=named):
        estimate(_normal(9, 2), **options)


@pytest.mark.parametrize("module", [GaussianEntropy, GaussianTotalCorrelation])
def test_modules_are_their_functions(module):
    z = _normal(20, 3)
    function = {
        GaussianEntropy: gaussian_entropy,
        GaussianTotalCorrelation: gaussian_total_correlation,
    }
    assert torch.equal(module(0.2)(z), function[module](z, 0.2))
    with pytest.raises(InputError, match="noise_variance=-1"):
        module(-1)


_SHAPES = [(9, 5), (8, 4), (5, 2), (3, 1), (4, 9)]  # uneven, even, with empty shards, m < d


def _weighted(values, units, layout):
    """A scalar of all units' (d/tp, …) values, infinite ones left out."""
    weights = torch.arange(1.0, 100)[units]
    values = values.masked_fill(values.isinf(), 0).flatten(1).sum(1)
    return total((values * weights).sum(), layout.features)


# Scalars of (features, own units, layout), and whether they need more samples than units.
_VALUES = {
    "gaussian": (lambda z, _, layout: gaussian_entropy(z, 0, layout), True),
    "with noise": (lambda z, _, layout: gaussian_entropy(z, 0.1, layout), False),
    "correlation": (lambda z, _, layout: gaussian_total_correlation(z, 0.1, layout), False),
    "neighbours": (lambda z, _, layout: knn_entropy(z, 2, layout), True),
    "total correlation": (lambda z, _, layout: total_correlation(z, 2, layout), True),
    "marginal": (
        lambda z, units, layout: _weighted(
            marginal_entropies(z, 1, layout)[:, None], units, layout
        ),
        False,
    ),
    "information": (
        lambda z, units, layout: _weighted(gaussian_mutual_information(z, layout), units, layout),
        False,
    ),
}


def _first_and_second(value, z, layout):
    """The value, its gradient g, and that of Σ g·cos(z)."""
    (gradient,) = torch.autograd.grad(value, z, create_graph=True)
    product = total((gradient * z.detach().cos()).sum(), layout.samples, layout.features)
    return value.detach(), gradient.detach(), torch.autograd.grad(product, z)[0]


def _errors(function, z, rows, units, layout):
    """Of the value, the gradient and a second derivative on the own block; relative."""
    whole = z.clone().requires_grad_()
    own = z[rows, units].clone().requires_grad_()
    slow = _first_and_second(function(whole, np.s_[: z.shape[1]], SINGLE), whole, SINGLE)
    fast = _first_and_second(function(own, units, layout), own, layout)
    blocks = ((), (rows, units), (rows, units))
    return [
        float((a - b[block]).norm() / (1 + b.norm()))
        for a, b, block in zip(fast, slow, blocks, strict=True)
    ]


def _spread(sizes):
    dp, tp = sizes
    entropy._CHUNK = 8  # several rounds of communication
    errors = {}
    with open_mesh(ParallelConfig(dp=dp, tp=tp)) as mesh:
        for m, d in _SHAPES:
            rows, units = (np.s_[r.start : r.stop] for r in (mesh.dp.shard(m), mesh.tp.shard(d)))
            z = _normal(m, d, m)
            for name, (function, is_tall) in _VALUES.items():
                if m > d or not is_tall:
                    errors[name, m, d] = max(_errors(function, z, rows, units, mesh.layout))
            binned = binned_mutual_information(z[rows, units], 3, mesh.layout)
            is_same = torch.equal(binned, binned_mutual_information(z, 3)[units])
            errors["binned", m, d] = 0.0 if is_same else 1.0
    return errors


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1)])
def test_spread_over_ranks_they_are_one_value_with_one_gradient(sizes):
    for errors in on_ranks(sizes[0] * sizes[1], _spread, sizes):
        assert len(errors) == 8 * 5 - 3
        assert {key: error for key, error in errors.items() if not error < 1e-9} == {}
