"""The axis over a process group is the axis on one process, value and gradient."""

import os

import pytest
import torch

from dense2conv.objectives import gaussian_information
from dense2conv.parallel import ParallelConfig, open_mesh
from tests.ranks import on_ranks


def _world():
    return int(os.environ["WORLD_SIZE"])


def _gather(total, dim):
    with open_mesh(ParallelConfig(tp=_world())) as mesh:
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
@pytest.mark.parametrize("dim", [0, 1])
def test_gather_joins_uneven_and_empty_shards(world_size, total, dim):
    assert on_ranks(world_size, _gather, total, dim) == [(True, True)] * world_size


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
