"""The log-determinant of spread weights against singular values, on 1, 2 and 4 ranks."""

import os

import pytest
import torch

from dense2conv.objectives import EfficientCoding, ObjectiveConfig, weight_rows
from dense2conv.objectives.weight_rows import columns_at_once, logdet_i_plus_of_rows
from dense2conv.shapes import Axis, Layout
from tests import oracles
from tests.ranks import on_ranks

ALPHA = 0.3
# (d, D), uneven shards and blocks: more inputs than units, as many, fewer (a sum, no gather).
SHAPES = [(9, 22), (7, 7), (11, 5)]


def _weight(shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=dtype)


class _Counted(Axis):
    """An axis that notes the largest tensor it has joined."""

    def __init__(self, axis):
        self.axis, self.size, self.rank, self.largest = axis, axis.size, axis.rank, 0

    def sum(self, tensor):
        return self.axis.sum(tensor)

    def gather(self, tensor, total, dim=0):
        joined = self.axis.gather(tensor, total, dim)
        if self.size > 1:
            self.largest = max(self.largest, joined.numel())
        return joined


def _noise_terms():
    """Rate and own gradient of each shape, and the most numbers that were gathered at once."""
    from dense2conv.parallel import ParallelConfig, open_mesh

    weight_rows._BLOCK = 30  # three columns of nine
    config = ObjectiveConfig(noise_variance=1.0, noise_correction=True)
    objective = EfficientCoding(config, lambda z: z, input_noise_std=ALPHA**0.5)
    results = []
    with open_mesh(ParallelConfig(tp=int(os.environ["WORLD_SIZE"]), device="cpu")) as mesh:
        for shape in SHAPES:
            own = mesh.tp.shard(shape[0])
            weight = _weight(shape)[own.start : own.stop].clone().requires_grad_()
            axis = _Counted(mesh.tp)
            z = torch.zeros(2, len(own), dtype=torch.float64)
            terms = objective(z, 2, shape[0], Layout(features=axis), weight)
            (-2 * terms.rate).backward()
            results.append((float(-2 * terms.rate), weight.grad, axis.largest))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_value_and_gradient_are_those_of_one_whole_weight(world_size):
    ranks = on_ranks(world_size, _noise_terms)
    for i, shape in enumerate(SHAPES):
        slow = _weight(shape).requires_grad_()
        oracle = oracles.logdet_i_plus(slow.T, ALPHA)
        oracle.backward()
        torch.testing.assert_close(torch.cat([rank[i][1] for rank in ranks]), slow.grad)
        for value, _, largest in (rank[i] for rank in ranks):
            assert value == pytest.approx(float(oracle.detach()), rel=1e-12)
            # The small side's matrix, or a block of at most 30 numbers; never all of W.
            assert largest <= max(30, min(shape) ** 2)


def test_digits_are_found_where_fp32_would_lose_them(monkeypatch):
    monkeypatch.setattr(weight_rows, "_BLOCK", 40)
    weight = (_weight((10, 17)) * 1e3).float().requires_grad_()
    value = logdet_i_plus_of_rows(weight, 1.0, Axis(), 10)
    value.backward()
    slow = weight.detach().double().requires_grad_()
    oracle = oracles.logdet_i_plus(slow.T, 1.0)
    oracle.backward()
    assert value.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(value.double(), oracle, rtol=1e-6, atol=0)
    torch.testing.assert_close(weight.grad.double(), slow.grad, rtol=1e-5, atol=1e-9)


def test_no_rows_no_columns_and_nan():
    for shape in ((0, 4), (3, 0)):
        assert float(logdet_i_plus_of_rows(torch.zeros(shape), 1.0, Axis(), shape[0])) == 0
    weight = _weight((3, 5))
    weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="layer2 hold NaN or Inf"):
        logdet_i_plus_of_rows(weight, 1.0, Axis(), 3, "layer2")
    assert columns_at_once(10**9) == 1
