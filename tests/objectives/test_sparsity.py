"""The penalties' maps against closed forms, duality, optimality and scikit-learn, on one rank and many."""

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import Lasso, MultiTaskLasso
from torch.utils._python_dispatch import TorchDispatchMode

from dense2conv.objectives import sparsity
from dense2conv.objectives.sparsity import PENALTIES, hard_threshold, make_penalty, soft_threshold
from dense2conv.parallel import ParallelConfig, open_mesh
from dense2conv.shapes import Axis, InputError
from tests.ranks import on_ranks

CONVEX = ["l1", "group_rows", "group_columns"]


def _weight(d, width, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d, width, generator=generator, dtype=torch.float64).to(dtype)


def _groups(name, shape, of_column=None):
    """Masks (d, D) of all groups whose norms the penalty ``name`` adds up."""
    d, width = shape
    number = torch.arange(d * width).view(d, width)
    if name == "group_rows":
        number = number // width
    elif name == "group_columns":
        column = torch.arange(width) if of_column is None else of_column
        number = column.expand(d, width)
    return [number == g for g in number.unique()]


def _slow_value(name, weight, strength, of_column=None):
    groups = _groups(name, weight.shape, of_column)
    return strength * sum((weight[g].norm() for g in groups), torch.zeros(()).double())


def _slow_prox(name, weight, threshold, of_column=None):
    out = torch.zeros_like(weight)
    for group in _groups(name, weight.shape, of_column):
        norm = weight[group].norm()
        if norm > threshold:
            out[group] = weight[group] * (1 - threshold / norm)
    return out


def _prox(name, weight, threshold, **options):
    out = weight.clone()
    make_penalty(name, 2 * threshold, **options).prox_(out, 0.5)
    return out


shapes = {"d": st.integers(0, 7), "width": st.integers(1, 7), "seed": st.integers(0, 1000)}


@pytest.mark.parametrize("name", CONVEX)
@settings(max_examples=25, deadline=None)
@given(threshold=st.floats(0, 3), **shapes)
def test_value_and_map_are_the_closed_form(name, d, width, seed, threshold):
    weight = _weight(d, width, seed)
    weight[:, 0] = 0
    torch.testing.assert_close(
        make_penalty(name, 0.7).value(weight), _slow_value(name, weight, 0.7), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        _prox(name, weight, threshold), _slow_prox(name, weight, threshold), rtol=1e-12, atol=1e-14
    )


@settings(max_examples=25, deadline=None)
@given(threshold=st.floats(0, 5), **shapes)
def test_columns_of_one_place_are_one_group(d, width, seed, threshold):
    weight = _weight(d, 3 * width, seed)
    groups = torch.arange(width).repeat(3)  # the channels of a pixel, channels first
    args = ("group_columns", weight, threshold)
    torch.testing.assert_close(
        _prox(*args, groups=groups), _slow_prox(*args, of_column=groups), rtol=1e-12, atol=1e-14
    )
    ours = make_penalty("group_columns", 0.7, groups=groups).value(weight)
    torch.testing.assert_close(ours, _slow_value("group_columns", weight, 0.7, groups))


@pytest.mark.parametrize("name", CONVEX)
def test_the_map_leaves_the_projection_onto_the_dual_ball(name):
    weight, threshold = _weight(3, 4), 0.9
    groups = [g.flatten().numpy() for g in _groups(name, weight.shape)]
    w = weight.flatten().numpy()
    ball = {"type": "ineq", "fun": lambda p: [threshold**2 - (p[g] ** 2).sum() for g in groups]}
    distance = {"fun": lambda p: ((p - w) ** 2).sum() / 2, "jac": lambda p: p - w}
    found = minimize(**distance, x0=0 * w, constraints=ball, options={"ftol": 1e-12})
    assert found.success
    residual = (weight - _prox(name, weight, threshold)).flatten().numpy()
    np.testing.assert_allclose(residual, found.x, atol=1e-6)


@pytest.mark.parametrize("name", CONVEX)
@settings(max_examples=25, deadline=None)
@given(threshold=st.floats(0.01, 3), **shapes)
def test_optimal_non_expansive_and_zeros_stay(name, d, width, seed, threshold):
    weight, other = _weight(d, width, seed), _weight(d, width, seed + 1)
    u, v = _prox(name, weight, threshold), _prox(name, other, threshold)
    for group in _groups(name, weight.shape):
        subgradient = (weight - u)[group] / threshold
        if u[group].any():
            torch.testing.assert_close(subgradient, u[group] / u[group].norm())
        else:
            assert subgradient.norm() <= 1 + 1e-12
    # Firmly non-expansive: ‖u − v‖² ≤ ⟨u − v, w − w'⟩.
    assert (u - v).square().sum() <= ((u - v) * (weight - other)).sum() + 1e-12
    again = _prox(name, u, threshold)
    assert not again[u == 0].any()


@pytest.mark.parametrize("name", ["l1", "group_rows"])
def test_a_step_size_a_row_is_a_map_a_row(name):
    weight, step_size = _weight(6, 5), torch.linspace(0, 2, 6, dtype=torch.float64)[:, None]
    ours = weight.clone()
    make_penalty(name, 0.8).prox_(ours, step_size)
    for row, slow, t in zip(ours, weight, step_size, strict=True):
        torch.testing.assert_close(row[None], _slow_prox(name, slow[None], 0.8 * float(t)))


@pytest.mark.parametrize(("name", "oracle"), [("l1", Lasso), ("group_columns", MultiTaskLasso)])
def test_proximal_gradient_solves_scikit_learns_problem(name, oracle):
    x, planted = _weight(40, 8, 1), _weight(3, 8, 2) * (torch.arange(8) < 3)
    y = x @ planted.T + 0.1 * _weight(40, 3, 3)
    solved = oracle(alpha=0.2, fit_intercept=False, tol=1e-12, max_iter=10_000).fit(x, y)
    step_size = len(x) / float(torch.linalg.matrix_norm(x, 2)) ** 2
    weight, penalty = torch.zeros(3, 8, dtype=torch.float64), make_penalty(name, 0.2)
    for _ in range(500):
        weight -= step_size * (x @ weight.T - y).T @ x / len(x)
        penalty.prox_(weight, step_size)
    np.testing.assert_allclose(weight, solved.coef_, atol=1e-8)
    np.testing.assert_array_equal(weight == 0, solved.coef_ == 0)
    assert (weight == 0).any()


def test_beta_lasso_is_the_papers_algorithm():
    lr, strength, beta = 0.1, 0.01, 5.0
    weight = _weight(20, 10) * 0.1
    slow, penalty = weight.clone(), make_penalty("beta_lasso", strength, beta=beta)
    optimizer = torch.optim.SGD([weight], lr=lr)
    for step in range(5):
        gradient = _weight(20, 10, step + 1)
        weight.grad = gradient.clone()
        penalty.add_subgradient_(weight.grad, weight)
        optimizer.step()
        penalty.prox_(weight, lr)
        slow = slow - lr * (gradient + strength * slow.sign())
        slow = slow * (slow.abs() >= beta * strength)
        torch.testing.assert_close(weight, slow, rtol=0, atol=1e-15)
        assert 0.1 < (weight == 0).double().mean() < 0.9
    torch.testing.assert_close(penalty.value(weight), strength * weight.abs().sum())


def test_beta_lasso_keeps_what_reaches_the_threshold_whatever_the_step_size():
    for step_size in (1e-3, 1.0, torch.ones(4, 1)):
        weight = torch.tensor([[-0.6], [-0.5], [0.49], [0.5]])
        make_penalty("beta_lasso", 0.1, beta=5).prox_(weight, step_size)
        assert weight.flatten().tolist() == pytest.approx([-0.6, -0.5, 0, 0.5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONVEX)
def test_half_precision_is_rounded_once(dtype, name):
    weight = _weight(30, 17, dtype=dtype)
    ours = weight.clone()
    make_penalty(name, 0.25).prox_(ours, 0.125)
    assert ours.dtype == dtype
    slow = _slow_prox(name, weight.double(), 0.03125).to(dtype)
    assert torch.equal(ours, slow)
    value = make_penalty(name, 0.25).value(weight)
    torch.testing.assert_close(value, _slow_value(name, weight.double(), 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thresholds_compare_in_full_precision(dtype):
    limit = 0.3  # not a bf16 number: its neighbours there are 0.298828125 and 0.30078125
    weight = torch.tensor([[0.298828125, 0.30078125]], dtype=dtype)
    hard_threshold(weight, limit)
    assert weight.tolist() == [[0, 0.30078125]]
    soft_threshold(weight, limit)
    assert weight[0, 1] == (torch.tensor(0.30078125) - torch.tensor(0.3)).to(dtype)


class _LargestNew(TorchDispatchMode):
    """The largest tensor that is newly made, views and in-place results left out."""

    def __init__(self):
        super().__init__()
        self.known, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        schema = func._schema
        if isinstance(out, torch.Tensor) and not any(r.alias_info for r in schema.returns):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("name", PENALTIES)
def test_temporaries_are_chunks_and_chunks_change_no_bit(name, monkeypatch):
    weight, step_size = _weight(60, 9, dtype=torch.float32), 0.3
    penalty, one, many = make_penalty(name, 0.5), weight.clone(), weight.clone()
    gradient = torch.zeros_like(weight)
    penalty.prox_(one, step_size)
    monkeypatch.setattr(sparsity, "_CHUNK", 40)
    with _LargestNew() as made:
        penalty.add_subgradient_(gradient, weight)
        penalty.prox_(many, step_size)
        penalty.value(many)
    assert made.largest <= 60  # 4 rows of 9, or one number a row
    assert torch.equal(one, many)
    assert not torch.equal(one, weight)


class _Counting(Axis):
    def __init__(self):
        self.summed = []

    def sum(self, tensor):
        self.summed.append(tensor.numel())
        return tensor


@pytest.mark.parametrize("name", PENALTIES)
def test_a_step_sends_column_norms_once_or_nothing(name):
    axis = _Counting()
    make_penalty(name, 0.1).prox_(_weight(4, 7), 0.1, axis)
    assert axis.summed == ([7] if name == "group_columns" else [])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: make_penalty("l2", 0.1), "l1, group_rows, group_columns, beta_lasso"),
        (lambda: make_penalty("l1", -0.1), "strength=-0.1"),
        (lambda: make_penalty("group_rows", math.nan), "strength=nan"),
        (lambda: make_penalty("beta_lasso", 0.1, beta=-1), "beta=-1"),
        (lambda: make_penalty("group_columns", 1, groups=torch.tensor([0, -1])), "from 0 up"),
        (lambda: make_penalty("group_columns", 1, groups=torch.ones(2)), "float32"),
        (lambda: make_penalty("group_columns", 1).prox_(_weight(2, 3), torch.ones(2, 1)), "a row"),
        (
            lambda: make_penalty("group_columns", 1, groups=torch.arange(2)).value(_weight(2, 3)),
            "2 groups for weights of 3 inputs",
        ),
    ],
)
def test_mistakes_name_the_value_and_the_remedy(make, named):
    with pytest.raises(InputError, match=named):
        make()


def _cases():
    for name in PENALTIES:
        for d in (1, 5, 8):  # over 4 ranks: one row and three empty shards; 2, 2, 1, 0; even
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                for groups in (None, torch.arange(3).repeat(2)):
                    if groups is None:
                        yield name, d, dtype, {}
                    elif name == "group_columns":
                        yield name, d, dtype, {"groups": groups}


def _on_shards():
    results = []
    with open_mesh(ParallelConfig(tp=int(os.environ["WORLD_SIZE"]))) as mesh:
        for name, d, dtype, options in _cases():
            weight = _weight(d, 6, d, dtype)
            weight[:, 1] = 0
            rows = mesh.tp.shard(d)
            part = weight[rows.start : rows.stop].clone()
            penalty = make_penalty(name, 0.3, **options)
            value = penalty.value(part, mesh.tp)
            penalty.prox_(part, 0.5, mesh.tp)
            results.append((rows, part, value))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shards_get_the_bits_of_one_process(world_size):
    for results in on_ranks(world_size, _on_shards):
        for (name, d, dtype, options), (rows, part, value) in zip(_cases(), results, strict=True):
            whole = _weight(d, 6, d, dtype)
            whole[:, 1] = 0
            penalty = make_penalty(name, 0.3, **options)
            torch.testing.assert_close(value, penalty.value(whole), rtol=1e-12, atol=0)
            penalty.prox_(whole, 0.5)
            own = whole[rows.start : rows.stop]
            if name == "group_columns" and dtype == torch.float64:
                # The sum over ranks adds the squares in another order.
                torch.testing.assert_close(part, own, rtol=1e-13, atol=0)
            else:
                assert torch.equal(part, own)
