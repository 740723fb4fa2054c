"""Variational rate reduction against d×d matrices, the exact class rate, and planted subspaces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dense2conv.objectives.rates import on_sphere
from dense2conv.objectives.variational import (
    VariationalRateReduction,
    variational_class_rate,
    variational_rate_reduction,
)
from dense2conv.parallel import ParallelConfig, open_mesh
from dense2conv.shapes import InputError
from tests import oracles
from tests.ranks import on_ranks

EPSILON_SQUARED, PENALTY = 0.3, 7.0


def _problem(m, d, num_classes, num_atoms, seed=0, dtype=torch.float64):
    """Features, labels (some -1), Γ and A (some entries below 0)."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(m, d, generator=g, dtype=torch.float64)
    labels = torch.randint(-1, num_classes, (m,), generator=g)
    dictionary = torch.randn(d, num_atoms, generator=g, dtype=torch.float64)
    spectra = torch.rand(num_atoms, num_classes, generator=g, dtype=torch.float64) - 0.2
    return features.to(dtype), labels, dictionary.to(dtype), spectra.to(dtype)


def _class_rate(features, labels, epsilon_squared):
    """R_c = Σ_k (m_k/2m) logdet(I + d/(m_k ε²) Z_kᵀZ_k)."""
    m, d = features.shape
    value = torch.zeros((), dtype=torch.float64)
    for k in labels[labels >= 0].unique():
        z = features[labels == k]
        alpha = d / (len(z) * epsilon_squared)
        value = value + len(z) / (2 * m) * oracles.logdet_i_plus(z, alpha)
    return value


def _slow(features, labels, dictionary, spectra, epsilon_squared, penalty):
    """R_c^v from d×d second moments."""
    m, d = features.shape
    atoms = dictionary / dictionary.norm(dim=0)
    value = torch.zeros((), dtype=torch.float64)
    for k in labels[labels >= 0].unique():
        z, a = features[labels == k], spectra[:, k].clamp(min=0)
        residual = z.T @ z / len(z) - atoms @ a.diag() @ atoms.T
        rate = torch.log(1 + d / epsilon_squared * a).sum()
        value = value + len(z) / (2 * m) * (rate + penalty * residual.square().sum())
    return value


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 20),
    d=st.integers(1, 8),
    num_classes=st.integers(1, 6),
    num_atoms=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_are_the_formula(m, d, num_classes, num_atoms, seed):
    z, labels, *parameters = _problem(m, d, num_classes, num_atoms, seed)
    ours = [t.clone().requires_grad_() for t in (z, *parameters)]
    slow = [t.clone().requires_grad_() for t in (z, *parameters)]
    value = variational_class_rate(ours[0], labels, *ours[1:], EPSILON_SQUARED, PENALTY)
    oracle = _slow(slow[0], labels, *slow[1:], EPSILON_SQUARED, PENALTY)
    torch.testing.assert_close(value, oracle, rtol=1e-10, atol=1e-10)
    if (labels >= 0).any():
        value.backward()
        oracle.backward()
        for a, b in zip(ours, slow, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("m", "d"), [(7, 2), (4, 4), (3, 5)])
def test_differentiable_twice(m, d):
    z, labels, dictionary, spectra = _problem(m, d, 2, 3)
    inputs = [t.requires_grad_() for t in (z, dictionary, spectra.abs())]

    def value(z, dictionary, spectra):
        return variational_rate_reduction(z, labels, dictionary, spectra, EPSILON_SQUARED, PENALTY)

    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradgradcheck(value, inputs)


def test_the_reduction_is_the_rate_less_the_class_rate():
    problem = _problem(15, 6, 3, 5)
    rate = 0.5 * oracles.logdet_i_plus(problem[0], 6 / (15 * EPSILON_SQUARED))
    torch.testing.assert_close(
        variational_rate_reduction(*problem, EPSILON_SQUARED, PENALTY),
        rate - _slow(*problem, EPSILON_SQUARED, PENALTY),
    )


@pytest.mark.parametrize(("m", "d"), [(60, 4), (12, 10), (9, 40)])
def test_latched_value_is_the_exact_class_rate(m, d):
    z, labels, *_ = _problem(m, d, 5, 1, seed=m)
    labels[labels == 2] = 3  # class 2 is empty
    module = VariationalRateReduction(d, 5, 5 * d, EPSILON_SQUARED, PENALTY, bound="none").double()
    module.latch(z, labels)
    exact = _class_rate(z, labels, EPSILON_SQUARED)
    parameters = (module.dictionary, module.spectra)
    value = variational_class_rate(z, labels, *parameters, EPSILON_SQUARED, PENALTY)
    torch.testing.assert_close(value, exact, rtol=1e-12, atol=0)
    loss = module(z, labels)
    rate = 0.5 * oracles.logdet_i_plus(z, d / (m * EPSILON_SQUARED))
    torch.testing.assert_close(loss, exact - rate, rtol=1e-10, atol=0)


def test_latching_too_few_atoms_leaves_out_what_costs_least():
    z, labels, *_ = _problem(40, 6, 3, 1)
    module = VariationalRateReduction(6, 3, 10, EPSILON_SQUARED, PENALTY, bound="none").double()
    module.latch(z, labels)
    prices, rates = [], []
    for k in range(3):
        z_k = z[labels == k]
        eigenvalues = torch.linalg.eigvalsh(z_k.T @ z_k / len(z_k))
        prices.append(len(z_k) * eigenvalues.square())
        rates.append(len(z_k) * torch.log1p(6 / EPSILON_SQUARED * eigenvalues))
    order = torch.cat(prices).argsort(descending=True)
    kept, left_out = order[:10], order[10:]
    expected = (torch.cat(rates)[kept].sum() + PENALTY * torch.cat(prices)[left_out].sum()) / 80
    parameters = (module.dictionary, module.spectra)
    value = variational_class_rate(z, labels, *parameters, EPSILON_SQUARED, PENALTY)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


@settings(max_examples=40, deadline=None)
@given(d=st.integers(1, 8), num_atoms=st.integers(1, 12), seed=st.integers(0, 1000))
def test_never_below_the_exact_class_rate_where_the_penalty_is_zero(d, num_atoms, seed):
    """Features made of the dictionary, Z_k = √m_k diag(a_k)^½ Γᵀ: any atoms, not eigenvectors."""
    _, _, dictionary, spectra = _problem(1, d, 3, num_atoms, seed)
    atoms, a = dictionary / dictionary.norm(dim=0), spectra.clamp(min=0)
    z = torch.cat([(num_atoms * a[:, k, None]).sqrt() * atoms.T for k in range(3)])
    labels = torch.arange(3).repeat_interleave(num_atoms)
    exact = _class_rate(z, labels, EPSILON_SQUARED)
    value = variational_class_rate(z, labels, dictionary, spectra, EPSILON_SQUARED, 1e3)
    assert value >= exact - 1e-9
    if num_atoms > 1 and d < num_atoms and (a.count_nonzero(0) > d).any():
        assert value > exact + 1e-6  # dependent atoms are strictly dearer


def test_the_best_factorisation_approaches_the_exact_class_rate():
    """Features fixed, Γ and A fitted from near their best: the stronger the penalty, the closer."""
    z, labels, noise, _ = _problem(30, 4, 2, 8)
    module = VariationalRateReduction(4, 2, 8, EPSILON_SQUARED, bound="none").double()
    module.latch(z, labels)
    exact = float(_class_rate(z, labels, EPSILON_SQUARED))
    gaps = []
    for penalty in (10.0, 100.0, 1000.0):
        dictionary = (module.dictionary + 0.1 * noise).detach().requires_grad_()
        spectra = (module.spectra + 0.1).detach().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [dictionary, spectra], max_iter=1000, line_search_fn="strong_wolfe"
        )

        def closure(parameters=(dictionary, spectra), penalty=penalty, optimizer=optimizer):
            optimizer.zero_grad()
            value = variational_class_rate(z, labels, *parameters, EPSILON_SQUARED, penalty)
            value.backward()
            return value.detach()

        optimizer.step(closure)
        gaps.append(abs(float(closure()) - exact) / exact)
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.001


class _LargestMade(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


@pytest.mark.parametrize("num_classes", [1, 4, 64])
def test_no_tensor_is_larger_than_features_projections_or_dictionary(num_classes):
    m, d, q = 128, 96, 80
    z, labels, *parameters = _problem(m, d, num_classes, q)
    inputs = [t.requires_grad_() for t in (z, *parameters)]
    with _LargestMade() as made:
        value = variational_class_rate(z, labels, *inputs[1:], EPSILON_SQUARED, PENALTY)
        torch.autograd.grad(value, inputs)
    assert made.largest <= m * d


def _planted():
    """Three planes in 12 dimensions, close to one another: cosines up to 0.94 between classes."""
    g = torch.Generator().manual_seed(0)
    common = torch.randn(2, 12, generator=g)
    bases = [common + 0.5 * torch.randn(2, 12, generator=g) for _ in range(3)]
    x = torch.cat([torch.randn(30, 2, generator=g) @ basis for basis in bases]).double()
    return x, torch.arange(3).repeat_interleave(30)


def _train_linear_map(x, loss, *groups, before=lambda step, z: None, num_steps=300):
    g = torch.Generator().manual_seed(1)
    weight = (torch.randn(12, 12, generator=g).double() / 12**0.5).requires_grad_()
    optimizer = torch.optim.Adam([{"params": [weight], "lr": 0.02}, *groups])
    for step in range(num_steps):
        before(step, (x @ weight.T).detach())
        optimizer.zero_grad()
        loss(x @ weight.T).backward()
        optimizer.step()
    return on_sphere(x @ weight.T).detach()


def test_planted_subspaces_come_apart_as_under_the_exact_objective():
    x, labels = _planted()
    eps, alpha = 0.1, 12 / (90 * 0.1)

    def reduction(z):
        return 0.5 * oracles.logdet_i_plus(z, alpha) - _class_rate(z, labels, eps)

    def largest_cosine(z):
        return float((z @ z.T).abs()[labels[:, None] != labels].max())

    exact = _train_linear_map(x, lambda z: -reduction(on_sphere(z)))
    module = VariationalRateReduction(12, 3, 6, eps).double()
    ours = _train_linear_map(
        x,
        lambda z: module(z, labels),
        {"params": list(module.parameters()), "lr": 0.01},
        before=lambda step, z: module.latch(z, labels) if step % 10 == 0 else None,
    )
    assert largest_cosine(on_sphere(x)) > 0.9
    assert largest_cosine(ours) < 0.02
    assert float(reduction(on_sphere(x))) < 0.6 * float(reduction(exact))
    assert float(reduction(ours)) == pytest.approx(float(reduction(exact)), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_is_summed_in_full(dtype):
    z, labels, dictionary, spectra = _problem(30, 8, 3, 6, dtype=dtype)
    problem = (z * 100, labels, dictionary, spectra)
    value = variational_class_rate(*problem, EPSILON_SQUARED, PENALTY)
    assert value.dtype == torch.float32
    wide = [t if t is labels else t.double() for t in problem]
    oracle = _slow(*wide, EPSILON_SQUARED, PENALTY)
    torch.testing.assert_close(value.double(), oracle, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_named(bad):
    z, labels, *parameters = _problem(10, 4, 2, 3)
    z[int((labels >= 0).nonzero()[0]), 1] = bad
    with pytest.raises(ValueError, match="the top layer"):
        variational_class_rate(
            z, labels, *parameters, EPSILON_SQUARED, PENALTY, name="the top layer"
        )
    with pytest.raises(ValueError, match="NaN or Inf"):
        VariationalRateReduction(4, 2, 3).latch(z.float(), labels)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"labels": torch.tensor([0, 1, 3])}, "a label of 3 among num_classes=3"),
        ({"labels": torch.tensor([0, 1])}, "one integer for each sample"),
        ({"labels": torch.rand(3)}, "float32"),
        ({"dictionary": torch.ones(4, 2)}, "spectra of 5 atoms"),
        ({"epsilon_squared": 0.0}, "epsilon_squared=0.0"),
        ({"penalty": -1.0}, "penalty=-1.0"),
    ],
)
def test_mistakes_name_the_value_and_the_remedy(changed, named):
    arguments = {
        "features": torch.ones(3, 4),
        "labels": torch.tensor([0, 1, 2]),
        "dictionary": torch.ones(4, 5),
        "spectra": torch.ones(5, 3),
        "epsilon_squared": 0.5,
        "penalty": 1.0,
    }
    with pytest.raises(InputError, match=named):
        variational_class_rate(**(arguments | changed))


# Over 4 ranks: even; uneven with an empty shard; m_k > d, then d > m_k, then both at once.
SHAPES = [(24, 4), (13, 5), (5, 13), (3, 9), (9, 3)]


def _on_mesh(sizes):
    dp, tp = sizes
    errors = []
    with open_mesh(ParallelConfig(dp=dp, tp=tp)) as mesh:
        for m, d in SHAPES:
            z, labels, dictionary, spectra = _problem(m, d, 3, 7, seed=m)
            rows, columns = mesh.dp.shard(m), mesh.tp.shard(d)
            r, c = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
            whole = [t.clone().requires_grad_() for t in (z, dictionary, spectra)]
            part = [t.clone().requires_grad_() for t in (z[r, c], dictionary[c], spectra)]
            constants = (EPSILON_SQUARED, PENALTY)
            expected = variational_rate_reduction(whole[0], labels, *whole[1:], *constants)
            value = variational_rate_reduction(
                part[0], labels[r], *part[1:], *constants, mesh.layout
            )
            expected.backward()
            value.backward()
            slow = [whole[0].grad[r, c], whole[1].grad[c], whole[2].grad]
            errors.append(float(value - expected))
            errors += [float((a.grad - b).norm()) for a, b in zip(part, slow, strict=True)]

            single = VariationalRateReduction(d, 3, 7).double()
            spread = VariationalRateReduction(d, 3, 7, layout=mesh.layout).double()
            errors.append(float((spread.dictionary - single.dictionary[c]).norm()))
            single.latch(z, labels)
            spread.latch(z[r, c], labels[r])
            errors.append(float((spread.spectra - single.spectra).norm()))
            errors.append(float(spread(z[r, c], labels[r]) - single(z, labels)))
        bad = labels.clone()
        bad[0] = 3  # on one process alone
        with pytest.raises(InputError, match="a label of 3"):
            spread(z[r, c], bad[r])
    return errors


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1)])
def test_spread_values_and_gradients_are_those_of_one_process(sizes):
    for errors in on_ranks(sizes[0] * sizes[1], _on_mesh, sizes):
        assert len(errors) == 7 * len(SHAPES)
        assert max(map(abs, errors)) < 1e-9
