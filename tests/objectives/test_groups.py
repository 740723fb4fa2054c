"""Groups of features: memberships, norms, and whether they find what belongs together."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dense2conv.objectives.groups import (
    Groups,
    GroupSparsity,
    blocks,
    grid,
    group_norms,
    group_sparsity,
    ring,
    shrink_groups,
    torus,
)
from dense2conv.parallel import ParallelConfig, open_mesh
from dense2conv.shapes import InputError
from tests.ranks import on_ranks


def _random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _members(groups):
    """The features of every group, sorted."""
    return [sorted(groups.feature[groups.group == g].tolist()) for g in range(groups.num_groups)]


def _random_groups(d, num_groups, seed):
    """Some in several groups, some in none; a group may be empty."""
    chosen = torch.rand(d, num_groups, generator=torch.Generator().manual_seed(seed)) < 0.4
    feature, group = chosen.nonzero(as_tuple=True)
    return Groups(feature, group, d, num_groups)


def _norms_oracle(z, groups, smoothing):
    squares = [z[:, members].square().sum(1) for members in _members(groups)]
    return (torch.stack(squares, 1) + smoothing).sqrt()


def test_blocks_follow_each_other():
    assert _members(blocks(7, 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert blocks(7, 3).overlap == 1


def test_a_ring_closes():
    assert _members(ring(5, 1)) == [[0, 1, 4], [0, 1, 2], [1, 2, 3], [2, 3, 4], [0, 3, 4]]
    assert ring(5, 1).overlap == 3


@pytest.mark.parametrize(("topography", "wraps"), [(torus, True), (grid, False)])
@pytest.mark.parametrize(("height", "width", "radius"), [(3, 5, 1), (5, 6, 2), (4, 3, 0)])
def test_sheets_have_squares_round_every_place(topography, wraps, height, width, radius):
    def near(a, b, side):
        gap = abs(a - b)
        return (min(gap, side - gap) if wraps else gap) <= radius

    places = list(itertools.product(range(height), range(width)))
    expected = [
        [i for i, (v, u) in enumerate(places) if near(v, y, height) and near(u, x, width)]
        for y, x in places
    ]
    assert _members(topography(height, width, radius)) == expected


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 6),
    d=st.integers(1, 12),
    num_groups=st.integers(1, 12),
    smoothing=st.floats(1e-3, 1.0),
    seed=st.integers(0, 1000),
)
def test_norms_and_their_gradient_are_the_formula(m, d, num_groups, smoothing, seed):
    groups = _random_groups(d, num_groups, seed)
    ours = _random(m, d, seed=seed).requires_grad_()
    slow = ours.detach().clone().requires_grad_()
    weights = _random(m, num_groups, seed=seed + 1)
    norms, oracle = group_norms(ours, groups, smoothing), _norms_oracle(slow, groups, smoothing)
    torch.testing.assert_close(norms, oracle)
    (norms * weights).sum().backward()
    (oracle * weights).sum().backward()
    torch.testing.assert_close(ours.grad, slow.grad)


@pytest.mark.parametrize("groups", [blocks(5, 2), ring(5, 1)], ids=["blocks", "ring"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_differentiable_twice(groups, smoothing):
    z = _random(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: group_sparsity(z, groups, smoothing), z)
    assert torch.autograd.gradgradcheck(lambda z: group_sparsity(z, groups, smoothing), z)


def test_silence_has_a_gradient_of_zero_with_smoothing_or_without():
    for smoothing, cost in ((0.0, 0.0), (0.04, 0.6)):
        z = torch.zeros(4, 5, requires_grad=True)
        loss = GroupSparsity(blocks(5, 2), smoothing)(z)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(cost)
        assert torch.equal(z.grad, torch.zeros(4, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_full(dtype):
    z = (300 * _random(40, 12)).to(dtype).requires_grad_()  # squares overflow fp16
    loss = group_sparsity(z, ring(12, 2))
    loss.backward()
    oracle = _norms_oracle(z.detach().double(), ring(12, 2), 0.01).sum(1).mean()
    torch.testing.assert_close(loss.double(), oracle, rtol=1e-5, atol=0)
    assert z.grad.dtype == dtype
    assert z.grad.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    d=st.integers(1, 9),
    size=st.integers(1, 4),
    threshold=st.floats(0, 3),
    seed=st.integers(0, 1000),
)
def test_shrinking_is_the_proximal_map(d, size, threshold, seed):
    z = _random(5, d, seed=seed)
    z[0] = 0
    shrunk = shrink_groups(z, threshold, blocks(d, size))
    # z − prox(z) is a subgradient of t Σ‖·‖ at prox(z), and only there.
    for before, after in zip(z.split(size, 1), shrunk.split(size, 1), strict=True):
        for b, a in zip(before, after, strict=True):
            if a.any():
                torch.testing.assert_close(b - a, threshold * a / a.norm())
            else:
                assert float(b.norm()) <= threshold * (1 + 1e-12)


def test_features_in_no_group_are_left_alone():
    z = _random(4, 3)
    pair = Groups(torch.tensor([0, 2]), torch.tensor([0, 0]), 3, 1)
    shrunk = shrink_groups(z, 100.0, pair)
    assert torch.equal(shrunk, z * torch.tensor([0, 1, 0]))


def _planted(num_pairs, num_samples=1000, seed=0):
    """Orthonormal sines and cosines, and their coefficients (m, 2 pairs): each pair is active
    seldom, in any phase.
    """
    generator = torch.Generator().manual_seed(seed)
    length = 2 * num_pairs + 1
    angles = torch.outer(torch.arange(1, num_pairs + 1), torch.arange(length)) * math.tau / length
    filters = torch.stack([angles.cos(), angles.sin()], 1).flatten(0, 1) * math.sqrt(2 / length)
    size = (num_samples, num_pairs)
    active = torch.rand(size, generator=generator) < 0.25
    amplitude = active * (1 + 0.2 * torch.randn(size, generator=generator))
    phase = math.tau * torch.rand(size, generator=generator)
    coefficients = torch.stack([amplitude * phase.cos(), amplitude * phase.sin()], 2).flatten(1)
    return filters, coefficients / coefficients.square().mean().sqrt()


def _side_by_side(pairs, groups):
    """Whether every two of one pair are neighbours: share a block, or follow each other on a ring."""
    shifts = [pairs] if groups.overlap == 1 else [pairs, pairs[1:] + pairs[:1]]
    return any(shifted[::2] == shifted[1::2] for shifted in shifts)


@pytest.mark.parametrize("groups", [blocks(6, 2), ring(6, 1)], ids=["blocks", "ring"])
def test_of_all_arrangements_the_cheapest_has_pairs_side_by_side(groups):
    _, z = _planted(3)
    costs = {
        order: float(group_sparsity(z[:, order], groups))
        for order in itertools.permutations(range(6))
    }
    best = min(costs, key=costs.get)
    assert _side_by_side([feature // 2 for feature in best], groups)


def _learned_basis(x, groups, start):
    """An orthonormal basis that minimises the cost, from a random one."""
    d = x.shape[1]
    first = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(start))).Q
    tangent = torch.zeros(d, d, requires_grad=True)
    optimizer = torch.optim.Adam([tangent], 0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    for _ in range(200):
        basis = first @ torch.linalg.matrix_exp(tangent - tangent.T)
        loss = group_sparsity(x @ basis.T, groups)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return float(loss.detach()), basis.detach()


@pytest.mark.parametrize("groups", [blocks(6, 2), ring(6, 1)], ids=["blocks", "ring"])
def test_phase_shifted_filters_are_learned_as_neighbours(groups):
    """Subspaces in whitened inputs; pairings are local minima, so the cheapest of ten starts."""
    filters, z = _planted(3)
    whitening = torch.linalg.svd(z @ filters, full_matrices=False)
    x = whitening.U[:, :6] * math.sqrt(len(z))  # (m, 6), its second moment is I
    _, basis = min((_learned_basis(x, groups, start) for start in range(10)), key=lambda r: r[0])
    atoms = basis @ (whitening.S[:6, None] * whitening.Vh[:6])  # (6, 7), in pixels again
    energy = (atoms @ filters.T).square().view(6, 3, 2).sum(2)  # (6, 3), of each frequency
    energy = energy / energy.sum(1, keepdim=True)
    assert float(energy.amax(1).min()) > 0.95
    assert _side_by_side(energy.argmax(1).tolist(), groups)


SHAPES = [(7, 6), (4, 5), (3, 12), (2, 3), (1, 1)]  # some processes hold nothing of the small ones


def _sharded_errors(sizes):
    """The greatest differences from one process, over shapes, groups and all that is computed."""
    dp, tp = sizes
    errors = []
    with open_mesh(ParallelConfig(dp=dp, tp=tp)) as mesh:
        for m, d in SHAPES:
            rows, columns = mesh.dp.shard(m), mesh.tp.shard(d)
            block = (slice(rows.start, rows.stop), slice(columns.start, columns.stop))
            whole, per_sample = _random(m, d, seed=d), _random(m, d, seed=d + 1)
            whole[0] = 0  # a sample without any activity
            topographies = [
                blocks(d, 1),
                blocks(d, 4),
                ring(d, (d - 1) // 2),
                _random_groups(d, d, 1),
            ]
            if d == 12:
                topographies += [torus(4, 3, 1), grid(3, 4, 2)]
            for groups in topographies:
                for smoothing in (0.0, 0.01):
                    slow = whole.clone().requires_grad_()
                    norms = group_norms(slow, groups, smoothing)
                    cost = group_sparsity(slow, groups, smoothing)
                    (cost + (norms.square() * per_sample[:, : groups.num_groups]).sum()).backward()
                    ours = whole[block].clone().requires_grad_()
                    own_norms = group_norms(ours, groups, smoothing, mesh.layout)
                    own_cost = GroupSparsity(groups, smoothing, mesh.layout)(ours)
                    weights = per_sample[block[0], : groups.num_groups]
                    (own_cost + (own_norms.square() * weights).sum()).backward()
                    errors += [
                        float((own_norms - norms[block[0]]).norm()),
                        float((own_cost - cost).abs()),
                        float((ours.grad - slow.grad[block]).norm()),
                    ]
                if groups.overlap == 1:
                    shrunk = shrink_groups(whole[block], 0.7, groups, mesh.layout)
                    errors.append(float((shrunk - shrink_groups(whole, 0.7, groups)[block]).norm()))
    return errors


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1)])
def test_groups_that_cross_processes_are_those_of_one(sizes):
    for errors in on_ranks(sizes[0] * sizes[1], _sharded_errors, sizes):
        assert len(errors) > 100
        assert max(errors) < 1e-9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_named_not_passed_on(bad):
    z = torch.zeros(5, 3)
    z[2, 1] = bad
    with pytest.raises(ValueError, match="layer 3"):
        group_sparsity(z, ring(3, 1), name="layer 3")


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        (lambda: blocks(6, 0), "size=0; use 1 or more"),
        (lambda: ring(6, -1), "radius=-1"),
        (lambda: ring(6, 3), "radius=3 .* use 2 or less"),
        (lambda: torus(4, 9, 2), "radius=2 .* use 1 or less"),
        (lambda: grid(0, 4, 1), "height=0"),
        (lambda: Groups(torch.tensor([4]), torch.tensor([0]), 4, 1), "feature 4 .* use 0 to 3"),
        (lambda: Groups(torch.tensor([1]), torch.tensor([-1]), 4, 1), "group -1"),
        (lambda: Groups(torch.tensor([1, 1]), torch.tensor([0, 0]), 4, 1), "twice"),
        (lambda: Groups(torch.tensor([1, 1]), torch.tensor([0]), 4, 1), "not pairs"),
        (lambda: group_norms(torch.zeros(2, 5), ring(6, 1)), "groups of 6 features"),
        (lambda: group_norms(torch.zeros(2, 6), ring(6, 1), -1.0), "smoothing=-1.0"),
        (lambda: GroupSparsity(ring(6, 1), float("nan")), "smoothing=nan"),
        (lambda: shrink_groups(torch.zeros(2, 6), 1.0, ring(6, 1)), "in 3 groups"),
        (lambda: shrink_groups(torch.zeros(2, 6), -1.0, blocks(6, 2)), "threshold=-1.0"),
    ],
)
def test_mistakes_name_the_value_and_the_remedy(mistake, named):
    with pytest.raises(InputError, match=named):
        mistake()
