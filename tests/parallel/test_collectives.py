"""The axis over a process group is the axis on one process, value and gradient."""

import os

import pytest
import torch

from dense2conv.objectives import gaussian_information
from dense2conv.parallel import ParallelConfig, open_mesh
from tests.ranks import on_ranks


def _world():
    return int(os.environ["WORLD_SIZE"])


def _gather(total, dim, by_pieces):
    with open_mesh(ParallelConfig(tp=_world())) as mesh:
        mesh.tp.sends_pieces = lambda tensor: by_pieces
        whole = torch.arange(total * 3.0, dtype=torch.float64).view(total, 3).movedim(0, dim)
        own = mesh.tp.shard(total)
        part = whole.narrow(dim, own.start, len(own)).clone().requires_grad_()
        joined = mesh.tp.gather(part, total, dim)
        # Each rank uses the whole with its own factor: gradients of the copies add up.
        (joined * (mesh.tp.rank + 1)).square().sum().backward()
        factor = sum((r + 1) ** 2 for r in range(mesh.tp.size))
        return torch.equal(joined, whole), torch.allclose(part.grad, 2 * factor * part)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("total", [1, 5, 8])
@pytest.mark.parametrize(("dim", "by_pieces"), [(0, True), (0, False), (1, True), (1, False)])
def test_gather_joins_uneven_and_empty_shards(world_size, total, dim, by_pieces):
    assert on_ranks(world_size, _gather, total, dim, by_pieces) == [(True, True)] * world_size


def _scatter_sum(total, dim, by_pieces):
    with open_mesh(ParallelConfig(tp=_world())) as mesh:
        mesh.tp.sends_pieces = lambda tensor: by_pieces
        whole = torch.arange(total * 3.0, dtype=torch.float64).view(total, 3).movedim(0, dim)
        summed = mesh.tp.scatter_sum(whole * (mesh.tp.rank + 1), dim)
        own, factor = mesh.tp.shard(total), sum(range(mesh.tp.size + 1))
        return torch.equal(summed, factor * whole.narrow(dim, own.start, len(own)))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("total", [1, 5, 8])
@pytest.mark.parametrize(("dim", "by_pieces"), [(0, True), (1, False)])
def test_every_process_has_its_shard_of_a_sum(world_size, total, dim, by_pieces):
    assert all(on_ranks(world_size, _scatter_sum, total, dim, by_pieces))


def _linear(total, dtype, with_bias, with_input_gradient):
    def draw(*shape, seed):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    with open_mesh(ParallelConfig(tp=_world())) as mesh:
        x, bias = draw(6, total, seed=0), draw(3, seed=1) if with_bias else None
        weights = [draw(3, total, seed=2 + rank) for rank in range(mesh.tp.size)]
        own = mesh.tp.shard(total)
        shard = x[:, own.start : own.stop].clone().requires_grad_(with_input_gradient)
        held = [t.clone().requires_grad_() for t in (weights[mesh.tp.rank], bias) if t is not None]
        output = mesh.tp.linear(shard, *held)
        output.square().sum().backward()
        # On one process: every rank's units on the whole input.
        whole = x.double().requires_grad_()
        slow = [t.detach().double().requires_grad_() for t in held]
        outputs = [whole @ weight.double().mT for weight in weights]
        outputs[mesh.tp.rank] = whole @ slow[0].mT
        shift = slow[1] if with_bias else 0
        sum((z + shift).square().sum() for z in outputs).backward()
        pairs = [(output, outputs[mesh.tp.rank] + shift), (held[0].grad, slow[0].grad)]
        if with_bias:  # every rank has a copy of its own here
            mine = (outputs[mesh.tp.rank] + shift).detach().mul(2).sum(0)
            pairs.append((held[1].grad, mine))
        if with_input_gradient:
            pairs.append((shard.grad, whole.grad[:, own.start : own.stop]))
        assert (shard.grad is not None) == with_input_gradient
        return [float((a.double() - b).norm() / (1 + b.norm())) for a, b in pairs]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("total", "dtype", "with_bias", "with_input_gradient"),
    [
        (8, torch.float64, True, True),
        (5, torch.float64, False, True),  # on four ranks the last one holds nothing
        (1, torch.float64, True, True),
        (9, torch.float64, False, False),
        (8, torch.float32, False, True),
        (8, torch.bfloat16, True, True),
    ],
)
def test_a_product_with_spread_columns_is_that_with_the_whole(
    world_size, total, dtype, with_bias, with_input_gradient
):
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for errors in on_ranks(world_size, _linear, total, dtype, with_bias, with_input_gradient):
        assert max(errors) < tolerance


def _rate(sizes, shape):
    dp, tp = sizes
    m, d = shape
    z = torch.randn(m, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with open_mesh(ParallelConfig(dp=dp, tp=tp)) as mesh:
        rows, columns = mesh.dp.shard(m), mesh.tp.shard(d)
        own = z[rows.start : rows.stop, columns.start : columns.stop].clone().requires_grad_()
        value = gaussian_information(own, 0.1, mesh.layout, m)
        value.backward()
        whole = z.clone().requires_grad_()
        expected = gaussian_information(whole, 0.1)
        expected.backward()
        slow = whole.grad[rows.start : rows.stop, columns.start : columns.stop]
        return float(value - expected), float((own.grad - slow).norm())  # a shard may be empty


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1)])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8), (4, 4)])
def test_the_rate_and_its_gradient_are_those_of_the_whole_batch(sizes, shape):
    for value_error, gradient_error in on_ranks(sizes[0] * sizes[1], _rate, sizes, shape):
        assert abs(value_error) < 1e-12
        assert gradient_error < 1e-12
