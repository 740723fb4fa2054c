"""The controls are what they claim to be."""

import pytest
import torch

from dense2conv.objectives import EfficientCoding, ObjectiveConfig
from dense2conv.training.verification import (
    controls,
    explained,
    held_out,
    in_pieces,
    whitening_gain,
)

CONFIG = ObjectiveConfig(noise_variance=0.05, l1=0.01)


@pytest.fixture(scope="module")
def correlated():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(40_000, 6, generator=generator, dtype=torch.float64) @ mixing
    return x[:36_000], x[36_000:]


def _value(z, norm=0.0, d=6):
    return held_out(EfficientCoding(CONFIG, lambda z: z), z, norm, CONFIG.l1, d)


def test_no_scale_of_the_identity_and_no_layer_does_better(correlated):
    train, test = correlated
    found = controls(CONFIG, train, test, 6)
    scales = torch.logspace(-3, 1, 400, dtype=torch.float64)
    best = [max(_value(s * test, 6 * float(s))[i] for s in scales) for i in (0, 1)]
    assert found.identity.rate_minus_power == pytest.approx(best[0], abs=1e-4)
    assert found.identity.objective == pytest.approx(best[1], abs=1e-4)
    weight = torch.eye(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.02)
    objective = EfficientCoding(CONFIG, lambda z: z)
    for _ in range(1500):
        optimizer.zero_grad()
        objective(train[:8000] @ weight.T, 8000, 6).loss.backward()
        optimizer.step()
    trained = _value(test @ weight.detach().T)
    assert found.zca.rate_minus_power == pytest.approx(trained.rate_minus_power, abs=2e-3)
    assert whitening_gain(trained, found) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("num_units", [3, 9])
def test_other_numbers_of_units_than_inputs(correlated, num_units):
    train, test = correlated
    found = controls(CONFIG, train, test, num_units)
    assert found.identity.rate_minus_power < found.zca.rate_minus_power
    if num_units > 6:
        square = controls(CONFIG, train, test, 6)
        for ours, of_six in zip(found, square, strict=True):
            assert ours.rate_minus_power == pytest.approx(of_six.rate_minus_power * 6 / num_units)


def test_white_noise_has_no_whitening_to_gain():
    x = torch.randn(30_000, 5, generator=torch.Generator().manual_seed(1))
    found = controls(CONFIG, x[:20_000], x[20_000:], 5)
    assert whitening_gain(_value(x[20_000:], d=5), found) is None


def test_controls_need_a_covariance_and_a_power_term(correlated):
    assert controls(ObjectiveConfig(power=0.0), *correlated, 6) is None
    assert controls(CONFIG, torch.zeros(2, 5000), torch.zeros(2, 5000), 5000) is None


def test_explained_is_r_squared_pooled_over_units():
    target = torch.randn(100, 3) * torch.tensor([1.0, 2.0, 0.0]) + 5
    assert explained(target, torch.zeros(100, 3)) == 1
    assert explained(target, target - target.mean(0)) == pytest.approx(0, abs=1e-5)
    assert explained(target[:, 2:], target[:, 2:] * 0) is None


def test_a_layer_is_shown_a_few_samples_at_a_time():
    shown = []

    def layer(x):
        shown.append(len(x))
        return 2 * x

    x = torch.randn(600, 2)
    assert torch.equal(in_pieces(layer, x), 2 * x)
    assert shown == [256, 256, 88]
