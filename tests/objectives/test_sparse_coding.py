"""Sparse coding: exact codes, dictionaries that are found again, and encoders that learn to infer."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso

from dense2conv.objectives.groups import Groups, blocks, ring
from dense2conv.objectives.sparse_coding import (
    SparseCoding,
    SparsePrior,
    random_dictionary,
    sparse_codes,
    sparse_coding_loss,
    updated_dictionary,
)
from dense2conv.objectives.sums import total
from dense2conv.parallel import ParallelConfig, open_mesh
from dense2conv.shapes import SINGLE, InputError
from tests.ranks import on_ranks

EXACT = {"num_iterations": 20_000, "tolerance": 1e-13}


def _problem(m, d, num_inputs, seed=0):
    """Inputs and a dictionary whose atoms resemble each other, as those of images do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, num_inputs, generator=generator, dtype=torch.float64)
    atoms = torch.randn(d, num_inputs, generator=generator, dtype=torch.float64)
    mixed = torch.randn(num_inputs, num_inputs, generator=generator, dtype=torch.float64)
    return x, F.normalize(atoms @ mixed)


def _objective(x, codes, atoms, prior):
    """½‖x − aD‖² + the cost, the mean over samples, from the formula."""
    cost = codes.abs().sum()
    if prior.groups is not None:
        members = [
            prior.groups.feature[prior.groups.group == g] for g in range(prior.groups.num_groups)
        ]
        squares = [codes[:, m].square().sum(1) + prior.smoothing for m in members]
        cost = torch.stack(squares).sqrt().sum()
    return (0.5 * (x - codes @ atoms).square().sum() + prior.price * cost) / len(x)


def _proximal_gradient(x, atoms, price, num_iterations, momentum):
    """ISTA, or with momentum the FISTA of 2009, which never restarts."""
    step = 1 / float(torch.linalg.eigvalsh(atoms @ atoms.T)[-1])
    codes = point = x.new_zeros(len(x), len(atoms))
    time = 1.0
    for _ in range(num_iterations):
        moved = point - step * (point @ atoms - x) @ atoms.T
        new = moved.sign() * (moved.abs() - step * price).clamp(min=0)
        next_time = (1 + (1 + 4 * time**2) ** 0.5) / 2
        point = new + (time - 1) / next_time * (new - codes) if momentum else new
        codes, time = new, next_time
    return codes


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 4),
    d=st.integers(1, 9),
    num_inputs=st.integers(1, 6),
    price=st.sampled_from([0.0, 0.05, 0.5, 100.0]),
    nonnegative=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_codes_satisfy_the_conditions_of_the_optimum(m, d, num_inputs, price, nonnegative, seed):
    x, atoms = _problem(m, d, num_inputs, seed)
    codes = sparse_codes(x, atoms, SparsePrior(price, nonnegative=nonnegative), **EXACT)
    pull = (x - codes @ atoms) @ atoms.T  # (m, d)
    torch.testing.assert_close(
        pull[codes != 0], price * codes[codes != 0].sign(), atol=1e-6, rtol=0
    )
    rest = pull[codes == 0]
    assert ((rest if nonnegative else rest.abs()) <= price + 1e-6).all()
    assert not nonnegative or (codes >= 0).all()


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize(("d", "num_inputs"), [(30, 16), (8, 16), (16, 16)])
def test_the_optimum_is_that_of_coordinate_descent(d, num_inputs, nonnegative):
    x, atoms = _problem(20, d, num_inputs)
    prior = SparsePrior(0.1, nonnegative=nonnegative)
    # scikit-learn divides the error by the number of inputs.
    lasso = Lasso(
        0.1 / num_inputs, fit_intercept=False, tol=1e-10, max_iter=10**6, positive=nonnegative
    )
    slow = torch.from_numpy(np.atleast_2d(lasso.fit(atoms.T.numpy(), x.T.numpy()).coef_))
    codes = sparse_codes(x, atoms, prior, num_iterations=5000, tolerance=1e-9)
    ours, oracle = (_objective(x, a, atoms, prior) for a in (codes, slow))
    assert abs(float(ours - oracle)) < 1e-6
    assert abs(float(sparse_coding_loss(x, codes, atoms, prior) - oracle)) < 1e-6
    assert (codes == 0).any()


def test_momentum_saves_iterations_and_restarts_save_more():
    x, atoms = _problem(100, 128, 64)
    prior = SparsePrior(0.3)
    best = _objective(x, sparse_codes(x, atoms, prior, **EXACT), atoms, prior)

    def gap(codes):
        return float(_objective(x, codes, atoms, prior) - best)

    fast = gap(sparse_codes(x, atoms, prior, num_iterations=150, tolerance=0))
    assert fast < gap(_proximal_gradient(x, atoms, 0.3, 150, momentum=True)) / 10
    assert fast < gap(_proximal_gradient(x, atoms, 0.3, 1500, momentum=False))


def test_a_warm_start_needs_fewer_iterations_and_the_optimum_none():
    x, atoms = _problem(20, 30, 16)
    prior = SparsePrior(0.1)
    best = sparse_codes(x, atoms, prior, **EXACT)
    again = sparse_codes(x, atoms, prior, start=best, num_iterations=1)
    torch.testing.assert_close(again, best, atol=1e-10, rtol=0)
    moved = F.normalize(atoms + 0.01 * atoms.roll(1, 0))
    warm, cold = (sparse_codes(x, moved, prior, start, num_iterations=20) for start in (best, None))
    assert _objective(x, warm, moved, prior) < _objective(x, cold, moved, prior)


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_disjoint_groups_are_zeroed_whole_at_the_exact_optimum(size, nonnegative):
    x, atoms = _problem(20, 30, 16)
    price = 0.5
    prior = SparsePrior(price, blocks(30, size), nonnegative=nonnegative)
    codes = sparse_codes(x, atoms, prior, **EXACT)
    pulls = ((x - codes @ atoms) @ atoms.T).view(20, -1, size)
    grouped = codes.view(20, -1, size)
    norms = grouped.norm(dim=2, keepdim=True)
    active = norms[..., 0] > 0
    assert active.any()
    assert not active.all()
    expected = price * grouped / norms.where(norms > 0, 1)
    if nonnegative:  # what pulls a silent code below 0 does not count
        pulls = torch.where(grouped == 0, pulls.clamp(min=0), pulls)
        assert (codes >= 0).all()
    else:
        assert (grouped[active] != 0).all()
    torch.testing.assert_close(pulls[active], expected[active], atol=1e-6, rtol=0)
    assert (pulls.norm(dim=2)[~active] <= price + 1e-6).all()


@pytest.mark.parametrize("groups", [ring(30, 2), blocks(30, 3)], ids=["ring", "blocks"])
def test_smoothed_groups_reach_the_optimum_of_the_smooth_objective(groups):
    x, atoms = _problem(10, 30, 16)
    prior = SparsePrior(0.2, groups, smoothing=1e-3)
    codes = sparse_codes(x, atoms, prior, **EXACT).requires_grad_()
    _objective(x, codes, atoms, prior).backward()
    assert float(codes.grad.abs().max()) < 1e-8


def _planted(m, d, num_inputs, num_active, seed):
    generator = torch.Generator().manual_seed(seed)
    atoms = F.normalize(torch.randn(d, num_inputs, generator=generator))
    active = torch.rand(m, d, generator=generator).topk(num_active, 1).indices
    values = 1 + torch.rand(m, num_active, generator=generator)
    values *= torch.randn(m, num_active, generator=generator).sign()
    codes = torch.zeros(m, d).scatter_(1, active, values)
    return codes @ atoms + 0.02 * torch.randn(m, num_inputs, generator=generator), codes, atoms


@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_dictionary_is_found_again_from_a_random_start(seed):
    x, _, atoms = _planted(3000, 48, 32, 3, seed)
    prior = SparsePrior(0.1)
    dictionary, codes = random_dictionary(range(48), 32, seed=10 + seed), None
    assert float((atoms @ dictionary.T).abs().amax(1).mean()) < 0.5
    for iteration in range(60):
        codes = sparse_codes(x, dictionary, prior, codes, num_iterations=20)
        dictionary = updated_dictionary(x, codes, dictionary, 5, seed=iteration)
    assert float((atoms @ dictionary.T).abs().amax(1).mean()) > 0.95


def test_active_groups_are_found_with_the_planted_dictionary():
    generator = torch.Generator().manual_seed(0)
    atoms = F.normalize(torch.randn(40, 32, generator=generator))
    active = torch.zeros(200, 20).scatter_(
        1, torch.rand(200, 20, generator=generator).topk(2, 1).indices, 1
    )
    directions = F.normalize(torch.randn(200, 20, 2, generator=generator), dim=2)
    x = (2 * active[..., None] * directions).flatten(1) @ atoms
    codes = sparse_codes(x, atoms, SparsePrior(0.1, blocks(40, 2)), num_iterations=500)
    found = codes.view(200, 20, 2).norm(dim=2) > 0.5
    assert float((found == active.bool()).all(1).float().mean()) > 0.95


def test_no_update_makes_the_reconstruction_worse():
    x, atoms = _problem(50, 20, 12)
    codes = sparse_codes(x, atoms, SparsePrior(0.05)).abs()  # alike in sign: the hard case
    last = (x - codes @ atoms).square().sum()
    for _ in range(30):
        atoms = updated_dictionary(x, codes, atoms, num_steps=1)
        torch.testing.assert_close(atoms.norm(dim=1), torch.ones(20, dtype=torch.float64))
        error = (x - codes @ atoms).square().sum()
        assert error < last
        last = error


def test_an_unused_atom_starts_afresh_as_what_a_sample_lacks():
    x, atoms = _problem(9, 5, 6)
    codes = sparse_codes(x, atoms, SparsePrior(0.1))
    codes[:, 3] = 0
    fresh = updated_dictionary(x, codes, atoms, num_steps=1)
    missing = F.normalize(x - codes @ atoms)
    assert float((fresh[3] @ missing.T).abs().max()) == pytest.approx(1)
    assert not torch.equal(fresh[3], updated_dictionary(x, codes, atoms, num_steps=1, seed=1)[3])
    nothing = updated_dictionary(x, torch.zeros_like(codes), atoms)
    assert float((nothing @ F.normalize(x).T).abs().amax(1).min()) == pytest.approx(1)


@pytest.mark.parametrize("prior", [SparsePrior(0.3), SparsePrior(0.3, ring(5, 1), 0.01)])
@pytest.mark.parametrize("m", [1, 4])
def test_the_loss_is_its_formula_and_differentiable_twice(prior, m):
    x, atoms = _problem(m, 5, 3)
    codes = _problem(m, 5, 5, seed=1)[0]
    tensors = [t.requires_grad_() for t in (x, codes, atoms)]
    torch.testing.assert_close(
        sparse_coding_loss(*tensors, prior), _objective(x, codes, atoms, prior)
    )
    assert torch.autograd.gradcheck(lambda *t: sparse_coding_loss(*t, prior), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: sparse_coding_loss(*t, prior), tensors)


def test_half_precision_goes_up_first():
    x, atoms = (t.bfloat16() for t in _problem(30, 12, 8))
    prior = SparsePrior(0.1)
    codes = sparse_codes(x, atoms, prior)
    loss = sparse_coding_loss(x, codes.bfloat16(), atoms, prior)
    oracle = _objective(x.double(), codes.bfloat16().double(), atoms.double(), prior)
    assert codes.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), oracle, rtol=1e-5, atol=0)


def test_a_dense_encoder_learns_to_infer():
    """On an orthonormal dictionary one layer, soft threshold λ behind it, is exact inference."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    x = torch.randn(500, 12, generator=generator)
    coding = SparseCoding(atoms, SparsePrior(0.5))
    exact = coding(x, coding.infer(x)).detach()
    encoder = torch.nn.Sequential(torch.nn.Linear(12, 12, bias=False), torch.nn.Softshrink(0.5))
    with torch.no_grad():
        encoder[0].weight.copy_(torch.randn(12, 12, generator=generator) / 4)
    optimizer = torch.optim.Adam(encoder.parameters(), 0.02)
    start = coding(x, encoder(x)).detach()
    for _ in range(300):
        loss = coding(x, encoder(x))
        assert loss.detach() >= exact * (1 - 1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert start > 1.3 * exact
    assert loss.detach() < 1.001 * exact
    torch.testing.assert_close(encoder[0].weight.detach(), atoms, atol=0.05, rtol=0)


def test_any_optimizer_may_move_the_atoms():
    x, _, atoms = _planted(1000, 20, 16, 2, seed=0)
    coding = SparseCoding(3 * random_dictionary(range(20), 16, seed=3), SparsePrior(0.1))
    optimizer = torch.optim.Adam(coding.parameters(), 0.1)
    torch.testing.assert_close(coding.atoms().norm(dim=1), torch.ones(20))
    for _ in range(150):
        loss = coding(x, coding.infer(x, num_iterations=30))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float((atoms @ coding.atoms().detach().T).abs().amax(1).mean()) > 0.95


SHAPES = [(7, 12, 5), (9, 5, 6), (1, 1, 2)]  # some processes hold nothing of the small ones


def _curvature_along(direction, tensors, prior, layout):
    """The second derivative of the loss by the codes, times a direction."""
    codes = tensors[1]
    loss = sparse_coding_loss(*tensors, prior, layout)
    (grad,) = torch.autograd.grad(loss, codes, create_graph=True)
    slope = total((grad * direction).sum(), layout.samples, layout.features)
    return torch.autograd.grad(slope, codes)[0]


def _sharded_errors(sizes):
    """The greatest differences from one process, over shapes, priors and all that is computed."""
    dp, tp = sizes
    errors = []
    with open_mesh(ParallelConfig(dp=dp, tp=tp)) as mesh:
        for m, d, num_inputs in SHAPES:
            rows, columns = mesh.dp.shard(m), mesh.tp.shard(d)
            rows, columns = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
            x, atoms = _problem(m, d, num_inputs)
            start = _problem(m, d, d, seed=1)[0]
            ends = torch.tensor(sorted({0, d - 1}))  # the first and the last code are one group
            for prior in (
                SparsePrior(0.1),
                SparsePrior(0.1, blocks(d, 4), nonnegative=True),
                SparsePrior(0.1, Groups(ends, torch.zeros_like(ends), d, 1)),
                SparsePrior(0.1, ring(d, (d - 1) // 2), smoothing=0.01),
            ):
                codes = sparse_codes(x, atoms, prior, start, 12, 1e-3)
                own = sparse_codes(
                    x[rows], atoms[columns], prior, start[rows, columns], 12, 1e-3, mesh.layout
                )
                errors.append(float((own - codes[rows, columns]).norm()))

                codes[:, -1] = 0  # an atom to start afresh
                new = updated_dictionary(x, codes, atoms, 3, 7)
                own = updated_dictionary(
                    x[rows], codes[rows, columns], atoms[columns], 3, 7, mesh.layout
                )
                errors.append(float((own - new[columns]).norm()))

                slow = [t.clone().requires_grad_() for t in (x, codes, atoms)]
                loss = sparse_coding_loss(*slow, prior)
                loss.backward()
                own = [x[rows], codes[rows, columns], atoms[columns]]
                own = [t.clone().requires_grad_() for t in own]
                own_loss = sparse_coding_loss(*own, prior, mesh.layout)
                own_loss.backward()
                errors.append(float((own_loss - loss).detach().abs()))
                x_grad, codes_grad, atoms_grad = (t.grad for t in slow)
                expected = (x_grad[rows], codes_grad[rows, columns], atoms_grad[columns])
                errors += [float((a.grad - b).norm()) for a, b in zip(own, expected, strict=True)]

                whole = _curvature_along(start, slow, prior, SINGLE)
                part = _curvature_along(start[rows, columns], own, prior, mesh.layout)
                errors.append(float((part - whole[rows, columns]).norm()))
    return errors


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1)])
def test_codes_atoms_and_every_gradient_are_those_of_one_process(sizes):
    for errors in on_ranks(sizes[0] * sizes[1], _sharded_errors, sizes):
        assert len(errors) == 84
        assert max(errors) < 1e-9


def test_random_dictionaries_do_not_depend_on_who_makes_them():
    whole = random_dictionary(range(100), 7, seed=3)
    assert torch.equal(random_dictionary(range(60, 90), 7, seed=3), whole[60:90])
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(100))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_and_inf_are_named_not_passed_on(bad, where):
    x, atoms = _problem(6, 5, 4)
    tensors = [x, torch.ones(6, 5), atoms]
    tensors[where][2, 1] = bad
    x, codes, atoms = tensors
    for call in (
        lambda: sparse_coding_loss(x, codes, atoms, SparsePrior(0.1), name="layer 3"),
        lambda: sparse_codes(x, atoms, SparsePrior(0.1), codes, name="layer 3"),
        lambda: updated_dictionary(x, codes, atoms, name="layer 3"),
    ):
        with pytest.raises(ValueError, match="layer 3"):
            call()


X, CODES, ATOMS = torch.zeros(6, 4), torch.zeros(6, 5), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        (lambda: SparsePrior(-0.1), "price=-0.1"),
        (lambda: SparsePrior(float("nan")), "price=nan"),
        (lambda: SparsePrior(0.1, ring(5, 1), -1.0), "smoothing=-1.0"),
        (lambda: SparsePrior(0.1, smoothing=0.1), "give groups too"),
        (lambda: sparse_codes(X, ATOMS.T, SparsePrior(0.1)), r"\(6, 4\).*\(4, 5\).*do not fit"),
        (lambda: sparse_codes(X, ATOMS, SparsePrior(0.1), CODES[:5]), "do not fit"),
        (lambda: sparse_codes(X, ATOMS, SparsePrior(0.1, ring(5, 1))), "in 3 groups"),
        (lambda: sparse_codes(X, ATOMS, SparsePrior(0.1, blocks(6, 2))), "groups of 6"),
        (lambda: sparse_codes(X, ATOMS, SparsePrior(0.1), num_iterations=-1), "num_iterations=-1"),
        (lambda: sparse_codes(X, ATOMS, SparsePrior(0.1), tolerance=-1), "tolerance=-1"),
        (lambda: sparse_coding_loss(X, CODES.T, ATOMS, SparsePrior(0.1)), "do not fit"),
        (lambda: updated_dictionary(X, CODES, ATOMS[:4]), "do not fit"),
        (lambda: updated_dictionary(X, CODES, ATOMS, num_steps=0), "num_steps=0"),
    ],
)
def test_mistakes_name_the_value_and_the_remedy(mistake, named):
    with pytest.raises(InputError, match=named):
        mistake()
