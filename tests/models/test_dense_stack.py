"""A stack built in parts is the stack built whole."""

import pytest
import torch

from dense2conv.models import DenseStack, ModelConfig
from dense2conv.models.dense_stack import Standardise
from dense2conv.shapes import Axis, InputError, Layout


class Part(Axis):
    """The shard of one rank of ``size``, without anybody to talk to."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [2, 3, 7])
def test_every_shard_holds_the_rows_of_the_whole(size):
    config = ModelConfig(widths=[130, 5], bias=True)
    whole = DenseStack(9, config).init(seed=3)
    for i in range(2):
        rows = [
            DenseStack(9, config, Layout(features=Part(rank, size))).init(3).layer(i).weight
            for rank in range(size)
        ]
        assert torch.equal(torch.cat(rows), whole.layer(i).weight)


def test_a_stage_holds_its_layers_alone():
    config = ModelConfig(widths=[6, 5, 4])
    whole, stage = DenseStack(9, config).init(0), DenseStack(9, config, layers=range(1, 2)).init(0)
    assert list(stage.layers) == ["layer2"]
    assert torch.equal(stage.layer(1).weight, whole.layer(1).weight)


def test_forward_names_every_layer_and_standardises_between():
    config = ModelConfig(widths=[6, 5, 4], nonlinearity="tanh")
    stack, x = DenseStack(9, config).init(0), torch.randn(50, 9)
    stack.normaliser(0).update(torch.tanh(stack.layer(0)(x)), 50)
    outputs = stack(x)
    assert [(name, tuple(z.shape)) for name, z in outputs.items()] == [
        ("layer1", (50, 6)),
        ("layer2", (50, 5)),
        ("layer3", (50, 4)),
    ]
    shown = stack.emit(0, outputs["layer1"])
    torch.testing.assert_close(shown.mean(0), torch.zeros(6), atol=1e-6, rtol=0)
    assert float(shown.detach().square().mean()) == pytest.approx(1, rel=1e-4)


def test_running_figures_start_with_the_first_batch_and_follow_slowly():
    normaliser = Standardise(2, 2)
    normaliser.init()
    normaliser.update(torch.tensor([[1.0, 3.0], [3.0, 5.0]]), 2)
    assert normaliser.mean.tolist() == [2, 4]
    assert float(normaliser.scale) == pytest.approx(1)
    for _ in range(2000):
        normaliser.update(torch.zeros(2, 2), 2)
    assert normaliser.mean.abs().max() < 1e-6


@pytest.mark.parametrize("fields", [{"widths": []}, {"widths": [3, 0]}, {"nonlinearity": "gelu"}])
def test_a_network_that_cannot_be_is_named(fields):
    with pytest.raises(InputError):
        ModelConfig(**fields).validate()
