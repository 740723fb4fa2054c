"""ICA against its formulas, and against planted sources: what it un-mixes, and what nobody can."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import FastICA
from torch import nn

from dense2conv.objectives.ica import (
    RICA,
    InfoMaxICA,
    equal_norm_rows,
    infomax_loss,
    infomax_natural_gradient,
    rica_loss,
)
from dense2conv.objectives.sums import total
from dense2conv.parallel import ParallelConfig, open_mesh
from dense2conv.shapes import SINGLE, InputError
from tests.ranks import on_ranks

SQUASHING = {"logistic": torch.sigmoid, "tanh": torch.tanh}
both = pytest.mark.parametrize("nonlinearity", SQUASHING)


def _randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def infomax_oracle(z, w, nonlinearity):
    """−log|det W| − E Σ log g′(z), with g′ as autograd finds it."""
    z = z if z.requires_grad else z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(SQUASHING[nonlinearity](z).sum(), z, create_graph=True)
    return -torch.det(w).abs().log() - slope.log().sum(1).mean()


def rica_oracle(x, w, reconstruction, smoothing):
    """One sample at a time."""
    costs = []
    for sample in x:
        z = torch.stack([row @ sample for row in w])
        error = sum(z_i * row for z_i, row in zip(z, w, strict=True)) - sample
        costs.append(reconstruction * (error @ error) + (z * z + smoothing).sqrt().sum())
    return torch.stack(costs).mean()


def gradients(value, *leaves):
    return torch.autograd.grad(value, leaves)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 20),
    d=st.integers(1, 8),
    nonlinearity=st.sampled_from(sorted(SQUASHING)),
    seed=st.integers(0, 1000),
)
def test_infomax_and_its_gradients_are_the_formula(m, d, nonlinearity, seed):
    x = _randn(m, d, seed=seed)
    # Small: where |z| is large, 1 − tanh² of the oracle has no digits left.
    w = (_randn(d, d, seed=seed + 1) / 2 / d**0.5).requires_grad_()
    z = (x @ w.detach().T).requires_grad_()
    ours, slow = infomax_loss(z, w, nonlinearity), infomax_oracle(z, w, nonlinearity)
    torch.testing.assert_close(ours, slow, rtol=1e-9, atol=1e-9)
    for a, b in zip(gradients(ours, z, w), gradients(slow, z, w), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)

    loss = infomax_loss(x @ w.T, w, nonlinearity)
    expected = -gradients(loss, w)[0] @ w.T @ w
    natural = infomax_natural_gradient(z, w, nonlinearity)
    torch.testing.assert_close(natural, expected, rtol=1e-7, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 12),
    num_inputs=st.integers(1, 8),
    d=st.integers(1, 12),
    reconstruction=st.sampled_from([0.0, 0.3, 10.0]),
    seed=st.integers(0, 1000),
)
def test_rica_and_its_gradients_are_the_formula(m, num_inputs, d, reconstruction, seed):
    x = _randn(m, num_inputs, seed=seed).requires_grad_()
    w = _randn(d, num_inputs, seed=seed + 1).requires_grad_()
    ours, slow = rica_loss(x, w, reconstruction, 0.05), rica_oracle(x, w, reconstruction, 0.05)
    torch.testing.assert_close(ours, slow, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(ours, x, w), gradients(slow, x, w), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@both
def test_infomax_is_differentiable_twice_also_at_zero(nonlinearity):
    z, w = _randn(5, 3), _randn(3, 3, seed=1).requires_grad_()
    z[1], z[2, 0] = 0, 30
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda z, w: infomax_loss(z, w, nonlinearity), (z, w))
    assert torch.autograd.gradgradcheck(lambda z, w: infomax_loss(z, w, nonlinearity), (z, w))


@pytest.mark.parametrize("d", [2, 3, 6])
def test_rica_is_differentiable_twice_also_at_zero(d):
    x, w = _randn(5, 3), _randn(d, 3, seed=1)
    x[1], w[0] = 0, 0
    leaves = (x.requires_grad_(), w.requires_grad_())
    assert torch.autograd.gradcheck(rica_loss, leaves)
    assert torch.autograd.gradgradcheck(rica_loss, leaves)


def test_tanh_is_the_logistic_at_twice_the_weights():
    z, w = _randn(20, 4), _randn(4, 4, seed=1)
    expected = infomax_loss(2 * z, 2 * w, "logistic") - 4 * math.log(2)
    torch.testing.assert_close(infomax_loss(z, w, "tanh"), expected)


def test_logistic_infomax_is_the_negative_log_likelihood():
    # One logistic variable of scale 1/w: its entropy is 2 − log w nats.
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    z, w = torch.logit(u)[:, None], torch.tensor([[3.0]], dtype=torch.float64)
    assert float(infomax_loss(z, w)) == pytest.approx(2 - math.log(3), abs=1e-3)


@both
def test_large_features_neither_overflow_nor_lose_their_gradient(nonlinearity):
    z = torch.tensor([[1e4, -1e4], [200.0, -200.0]], requires_grad=True)
    loss = infomax_loss(z, torch.eye(2), nonlinearity)
    slope = {"logistic": 1, "tanh": 2}[nonlinearity]
    constant = {"logistic": 0, "tanh": 2 * math.log(4)}[nonlinearity]
    assert float(loss.detach()) == pytest.approx(slope * 10_200 - constant, rel=1e-6)
    assert torch.equal(gradients(loss, z)[0], slope * z.detach().sign() / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_full(dtype):
    x, w = _randn(3000, 4).to(dtype), _randn(4, 4, seed=1).to(dtype)
    for ours, slow in [
        (infomax_loss(x, w), infomax_oracle(x.double(), w.double(), "logistic")),
        (rica_loss(x, w), rica_oracle(x.double(), w.double(), 1.0, 0.01)),
    ]:
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), slow, rtol=1e-5, atol=1e-5)
    natural = infomax_natural_gradient(x, w)
    assert natural.dtype == dtype
    expected = infomax_natural_gradient(x.double(), w.double())
    torch.testing.assert_close(natural.double(), expected, rtol=1e-2, atol=1e-2)


def test_modules_are_their_functions():
    x, w = _randn(9, 4), _randn(4, 4, seed=1)
    assert torch.equal(InfoMaxICA("tanh")(x, w), infomax_loss(x, w, "tanh"))
    assert torch.equal(RICA(3.0, 0.1)(x, w), rica_loss(x, w, 3.0, 0.1))


def test_a_natural_gradient_step_on_a_linear_layer_lowers_the_loss():
    layer = nn.Linear(4, 4, bias=False, dtype=torch.float64)
    nn.init.orthogonal_(layer.weight, generator=torch.Generator().manual_seed(0))
    optimizer, objective = torch.optim.SGD(layer.parameters(), lr=0.1), InfoMaxICA()
    x, losses = _sources("laplace", 500, 4), []
    for _ in range(20):
        z = layer(x)
        losses.append(objective(z, layer.weight).item())
        layer.weight.grad = -infomax_natural_gradient(z, layer.weight)
        optimizer.step()
    assert losses == sorted(losses, reverse=True)


def _sources(kind, m, d, seed=0):
    """(m, d) independent sources of unit variance."""
    u = torch.rand(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    s = {
        "laplace": -(u - 0.5).sign() * torch.log1p(-2 * (u - 0.5).abs()),
        "sech": torch.log(torch.tan(torch.pi / 2 * u)),
        "gaussian": torch.special.ndtri(u),
    }[kind]
    return s / s.std(0)


def _whitened(x):
    """Inputs of covariance I, x V, and the symmetric V."""
    x = x - x.mean(0)
    variances, axes = torch.linalg.eigh(x.T @ x / len(x))
    v = axes * variances.rsqrt() @ axes.T
    return x @ v, v


def _amari_error(p):
    """0 where P, of un-mixing times mixing, is a scaled permutation; 1 where all |P_ij| are equal.

    (Σ_i (Σ_j |P_ij| / max_j |P_ij| − 1) + Σ_j (Σ_i |P_ij| / max_i |P_ij| − 1)) / (2d(d − 1))
    """
    p, d = p.abs(), len(p)
    rows, columns = p.sum(1) / p.amax(1) - 1, p.sum(0) / p.amax(0) - 1
    return float(rows.sum() + columns.sum()) / (2 * d * (d - 1))


def _unmix(x, nonlinearity, w=None, num_steps=400):
    w = torch.eye(x.shape[1], dtype=torch.float64) / x.std() if w is None else w
    for _ in range(num_steps):
        w = w + 0.2 * infomax_natural_gradient(x @ w.T, w, nonlinearity)
    return w


def _minimise(loss, w):
    w = w.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [w], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-10
    )

    def closure():
        optimizer.zero_grad()
        value = loss(w)
        value.backward()
        return value

    optimizer.step(closure)
    return w.detach()


def test_the_amari_error_runs_from_0_to_1():
    assert _amari_error(torch.diag(torch.tensor([3.0, -2.0, 0.1]))[[2, 0, 1]]) == 0
    assert _amari_error(torch.ones(5, 5)) == 1


@both
@pytest.mark.parametrize("kind", ["laplace", "sech"])
@pytest.mark.parametrize("whiten", [False, True])
def test_the_natural_gradient_unmixes_as_well_as_fastica(kind, whiten, nonlinearity):
    mixing = _randn(8, 8, seed=101)
    x = _sources(kind, 8000, 8, seed=1) @ mixing.T
    fast = FastICA(random_state=0, tol=1e-8, whiten="unit-variance").fit(x.numpy())
    fast_error = _amari_error(torch.from_numpy(fast.components_) @ mixing)
    if whiten:
        x, v = _whitened(x)
        mixing = v @ mixing
    error = _amari_error(_unmix(x, nonlinearity) @ mixing)
    assert error < 0.02
    assert error < fast_error + 0.002


@both
def test_gaussian_sources_stay_mixed(nonlinearity):
    mixing = _randn(8, 8, seed=101)
    x = _sources("gaussian", 8000, 8, seed=1) @ mixing.T
    w = _unmix(x, nonlinearity, num_steps=1000)
    z = x @ w.T
    covariance = z.T @ z / len(z)
    assert (covariance / covariance.diagonal().mean() - torch.eye(8)).abs().max() < 0.05
    assert _amari_error(w @ mixing) > 0.2


def test_the_path_does_not_depend_on_the_mixing():
    sources, mixing = _sources("laplace", 500, 6), _randn(6, 6)
    start = _randn(6, 6, seed=1) / 3
    mixed = _unmix(sources @ mixing.T, "tanh", start, num_steps=30) @ mixing
    torch.testing.assert_close(mixed, _unmix(sources, "tanh", start @ mixing, num_steps=30))


def test_complete_rica_is_ica():
    mixing = _randn(8, 8, seed=101)
    x, v = _whitened(_sources("laplace", 8000, 8, seed=1) @ mixing.T)
    w = _minimise(lambda w: rica_loss(x, w, 10.0), 0.3 * _randn(8, 8, seed=2))
    assert (w @ w.T - torch.eye(8)).abs().max() < 0.03
    assert _amari_error(w @ v @ mixing) < 0.02


@pytest.fixture(scope="module")
def two_bases():
    """Samples sparse in one of two orthonormal bases, whitened, and the 24 filters that show it."""
    generator = torch.Generator().manual_seed(101)
    s = _sources("laplace", 8000, 12) * (torch.rand(8000, 12, generator=generator) < 0.3)
    bases = [torch.linalg.qr(_randn(12, 12, seed=seed)).Q for seed in (1, 2)]
    first = torch.rand(8000, 1, generator=generator) < 0.5
    x, v = _whitened(torch.where(first, s @ bases[0].T, s @ bases[1].T))
    filters = torch.cat(bases, dim=1).T @ v  # (24, 12)
    return x, filters / filters.norm(dim=1, keepdim=True)


def _best_cosines(w, filters):
    """(24,) of every filter with the row of W that is most like it."""
    return (nn.functional.normalize(w, dim=1) @ filters.T).abs().amax(0)


def _error_share(x, w):
    return float((x @ w.T @ w - x).square().sum() / x.square().sum())


def test_rica_finds_both_bases_with_rows_of_one_norm(two_bases):
    x, filters = two_bases
    start = _randn(24, 12, seed=3)
    w = equal_norm_rows(_minimise(lambda w: rica_loss(x, equal_norm_rows(w)), start))
    torch.testing.assert_close(w.square().sum(1), torch.full((24,), 0.5, dtype=torch.float64))
    # A local optimum may miss a few of the 24; random rows are far from all of them.
    assert int((_best_cosines(w, filters) > 0.99).sum()) >= 20
    assert _best_cosines(start, filters).max() < 0.95
    assert _error_share(x, w) < 0.01


def test_overcomplete_rica_with_free_norms_keeps_one_basis(two_bases):
    x, _ = two_bases
    w = _minimise(lambda w: rica_loss(x, w), 0.3 * _randn(24, 12, seed=3))
    assert int((w.norm(dim=1) > 0.05).sum()) == 12
    assert _error_share(x, w) < 0.05


def _block(tensor, axes):
    """Own block of a tensor whose leading dims are spread over ``axes``."""
    for dim, axis in enumerate(axes):
        shard = axis.shard(tensor.shape[dim])
        tensor = tensor.narrow(dim, shard.start, len(shard))
    return tensor


def _derivatives(loss, leaves, spread, layout):
    """The value, its gradients, and the second derivatives along one direction, own blocks."""
    blocks = [
        _block(leaf, axes).clone().requires_grad_()
        for leaf, axes in zip(leaves, spread, strict=True)
    ]
    value = loss(*blocks, layout)
    first = torch.autograd.grad(value, blocks, create_graph=True)
    along = sum(
        total((grad * _block(_randn(*leaf.shape, seed=9), axes)).sum(), *axes)
        for grad, leaf, axes in zip(first, leaves, spread, strict=True)
    )
    return [value, *first, *torch.autograd.grad(along, blocks)]


def _same(ours, slow):
    return torch.allclose(ours, slow, rtol=1e-9, atol=1e-9)


def _compare(loss, leaves, spread, layout):
    """Which of value, both gradients and both second derivatives are those of one process."""
    ours = _derivatives(loss, leaves, spread, layout)
    slow = _derivatives(loss, leaves, ((), ()), SINGLE)
    own = ((), *spread, *spread)
    return [_same(a, _block(b, axes)) for a, b, axes in zip(ours, slow, own, strict=True)]


def _spread(sizes, shapes):
    """Everything that ought to hold on every rank, by shape and name."""
    holds = {}
    with open_mesh(ParallelConfig(dp=sizes[0], tp=sizes[1])) as mesh:
        layout = mesh.layout
        rows, units, both_axes = (mesh.dp,), (mesh.tp,), (mesh.dp, mesh.tp)
        for m, num_inputs, d in shapes:
            x, w = _randn(m, num_inputs), _randn(d, num_inputs, seed=1)
            z, own_w = x @ w.T, _block(w, units)
            holds[m, num_inputs, d, "rica"] = _compare(
                lambda x, w, layout: rica_loss(x, w, 2.0, 0.1, layout),
                (x, w),
                (rows, units),
                layout,
            )
            scaled = equal_norm_rows(own_w, layout)
            holds[m, num_inputs, d, "norms"] = [_same(scaled, _block(equal_norm_rows(w), units))]
            for g in SQUASHING if d == num_inputs else ():
                natural = infomax_natural_gradient(_block(z, both_axes), own_w, g, layout)
                slow = infomax_natural_gradient(z, w, g)
                holds[m, num_inputs, d, g] = [
                    _same(natural, _block(slow, units)),
                    *_compare(
                        lambda z, w, layout, g=g: infomax_loss(z, w, g, layout),
                        (z, w),
                        (both_axes, units),
                        layout,
                    ),
                ]
        # NaN in the block of one process is an error on all of them.
        x, w = _randn(8, 4), torch.eye(4, dtype=torch.float64)
        x[0, 0] = float("nan")
        for objective, axes in [
            (infomax_loss, both_axes),
            (infomax_natural_gradient, both_axes),
            (rica_loss, rows),
        ]:
            with pytest.raises(ValueError, match="NaN"):
                objective(_block(x, axes), _block(w, units), layout=layout)
        # So is a basis that is not square.
        x, w = _randn(8, 5), _randn(5, 4)
        with pytest.raises(InputError, match="as many units as inputs"):
            infomax_loss(_block(x, both_axes), _block(w, units), layout=layout)
    return {name for name, checks in holds.items() if not all(checks)}, len(holds)


# (m, D, d), with shards that are uneven and empty.
SHAPES = [(9, 5, 5), (8, 4, 4), (1, 3, 3), (5, 3, 7), (6, 6, 2), (2, 4, 1)]


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1)])
def test_values_and_every_gradient_are_those_of_one_process(sizes):
    num_ranks = sizes[0] * sizes[1]
    assert on_ranks(num_ranks, _spread, sizes, SHAPES) == [(set(), 18)] * num_ranks


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: infomax_loss(torch.ones(5, 3), torch.ones(3, 4)), "as many units as inputs"),
        (lambda: infomax_loss(torch.ones(5, 2), torch.eye(3)), "as many units as inputs"),
        (lambda: infomax_natural_gradient(torch.ones(5, 3), torch.ones(3, 4)), "use rica_loss"),
        (lambda: infomax_loss(torch.ones(5, 2), torch.zeros(2, 2)), "singular"),
        (lambda: infomax_loss(torch.ones(5, 2), torch.eye(2), "relu"), "logistic or tanh"),
        (lambda: InfoMaxICA("relu"), "'relu'"),
        (lambda: rica_loss(torch.ones(5, 2), torch.eye(3)), r"use \(m, D\) and \(d, D\)"),
        (lambda: rica_loss(torch.ones(5, 3), torch.eye(3), -1.0), "reconstruction=-1.0"),
        (lambda: RICA(smoothing=0.0), "smoothing=0.0"),
        (lambda: RICA(reconstruction=float("nan")), "reconstruction=nan"),
    ],
)
def test_mistakes_name_the_value_and_the_remedy(call, named):
    with pytest.raises(InputError, match=named):
        call()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("objective", [infomax_loss, infomax_natural_gradient, rica_loss])
def test_nan_and_inf_are_named_not_passed_on(objective, bad):
    x = _randn(5, 3)
    x[2, 1] = bad
    with pytest.raises(ValueError, match=r"of the retina is .* NaN or Inf"):
        objective(x, torch.eye(3, dtype=torch.float64), name="the retina")
