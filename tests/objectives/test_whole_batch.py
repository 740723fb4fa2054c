"""Pieces of a batch give the gradient of the whole; their mean does not."""

import pytest
import torch
from torch import nn

from dense2conv.objectives import accumulate_gradients, coding_rate, whole_batch


def problem():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    x = torch.randn(13, 5, dtype=torch.float64)
    loss = -coding_rate(network(x), 0.5)
    return network, x, loss.detach(), torch.autograd.grad(loss, list(network.parameters()))


@pytest.mark.parametrize("sizes", [[13], [5, 5, 3], [1] * 13, [12, 0, 1]])
def test_micro_batches_and_accumulation_are_exact(sizes):
    network, x, value, expected = problem()
    with whole_batch([network(piece) for piece in x.split(sizes)]) as z:
        loss = -coding_rate(z, 0.5)
        loss.backward()
    found = [p.grad for p in network.parameters()]
    torch.testing.assert_close([loss.detach(), *found], [value, *expected])
    network.zero_grad()
    loss = accumulate_gradients(network, x.split(sizes), lambda z: -coding_rate(z, 0.5))
    found = [p.grad for p in network.parameters()]
    torch.testing.assert_close([loss, *found], [value, *expected])


def test_the_mean_of_the_pieces_rates_is_another_objective():
    network, x, value, _ = problem()
    mean = -torch.stack([coding_rate(network(piece), 0.5) for piece in x.chunk(2)]).mean()
    assert not torch.isclose(mean, value, rtol=1e-2)
