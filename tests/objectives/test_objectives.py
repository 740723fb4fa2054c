"""The objectives against their formulas: values, gradients, and what degenerates."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dense2conv.objectives import (
    EfficientCoding,
    ObjectiveConfig,
    coding_rate,
    gaussian_information,
    logdet_i_plus,
    soft_threshold,
)
from dense2conv.objectives.factorisation import factorise, in_enough_digits
from dense2conv.shapes import InputError
from tests import oracles


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 24),
    d=st.integers(1, 24),
    alpha=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
def test_value_and_gradient_are_the_formula_on_either_side(m, d, alpha, seed):
    z = torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours, slow = z.clone().requires_grad_(), z.clone().requires_grad_()
    value, oracle = logdet_i_plus(ours, alpha), oracles.logdet_i_plus(slow, alpha)
    value.backward()
    oracle.backward()
    torch.testing.assert_close(value, oracle, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.grad, slow.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("m", "d"), [(9, 4), (4, 9), (5, 5)])
def test_two_normalisations_of_one_quantity(m, d):
    z = torch.randn(m, d, dtype=torch.float64)
    torch.testing.assert_close(coding_rate(z, 0.5), gaussian_information(z, 0.5 / d))


def test_the_rate_does_not_see_rotations():
    z = torch.randn(30, 8, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    torch.testing.assert_close(coding_rate(z, 0.1), coding_rate(z @ rotation, 0.1))


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
@pytest.mark.parametrize("epsilon_squared", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("kind", ["collapsed", "duplicated", "zero", "rank_two"])
def test_fp32_is_finite_and_right_on_degenerate_features(shape, epsilon_squared, kind):
    m, d = shape
    generator = torch.Generator().manual_seed(0)
    z = {
        "collapsed": torch.ones(m, d),
        "duplicated": torch.randn(m, 1, generator=generator).expand(m, d).clone(),
        "zero": torch.zeros(m, d),
        "rank_two": torch.randn(m, 2, generator=generator) @ torch.randn(2, d, generator=generator),
    }[kind]
    ours, slow = z.clone().requires_grad_(), z.double().requires_grad_()
    value = coding_rate(ours, epsilon_squared)
    oracle = 0.5 * oracles.logdet_i_plus(slow, d / (m * epsilon_squared))
    value.backward()
    oracle.backward()
    assert value.isfinite()
    torch.testing.assert_close(value.double(), oracle, rtol=1e-4, atol=1e-5)
    scale = slow.grad.abs().max().clamp(min=1e-12)
    assert float((ours.grad - slow.grad).abs().max() / scale) < 1e-3


def test_what_was_made_with_too_few_digits_is_let_go_of_before_more_are_taken():
    made = []

    def value(z):
        assert all(gram() is None for gram in made)
        gram = z @ z.T
        made.append(weakref.ref(gram))
        return factorise(gram, torch.tensor(1e6, dtype=torch.float64), "a layer")[0]

    assert in_enough_digits(value, torch.ones(50, 9)).dtype == torch.float64
    assert len(made) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_accumulated_in_full(dtype):
    z = torch.randn(40, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = z.clone().requires_grad_()
    value = coding_rate(ours, 0.1)
    value.backward()
    torch.testing.assert_close(
        value.double(), 0.5 * oracles.logdet_i_plus(z, 12 / 4), rtol=1e-4, atol=0
    )
    assert ours.grad.dtype == dtype
    assert ours.grad.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_named_not_passed_on(bad):
    z = torch.randn(5, 3)
    z[2, 1] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        coding_rate(z, 0.1)
    with pytest.raises(ValueError, match="features of layer2 hold NaN or Inf"):
        EfficientCoding(ObjectiveConfig(), torch.abs)(z, 5, 3, name="layer2")


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_efficient_coding_is_its_formula(shape):
    m, d = shape
    x = torch.randn(m, 7, dtype=torch.float64)
    weight = torch.randn(d, 7, dtype=torch.float64)
    config = ObjectiveConfig(noise_variance=0.2, power=0.7, noise_correction=True)
    objective = EfficientCoding(config, lambda z: z, input_noise_std=0.3)
    ours, slow = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = objective(x @ ours.T, m, d, weight=ours).loss
    oracle = oracles.efficient_coding_loss(x, slow, 0.2, 0.7, 0.3)
    loss.backward()
    oracle.backward()
    torch.testing.assert_close(loss, oracle)
    torch.testing.assert_close(ours.grad, slow.grad)


def test_post_codes_the_centred_activations():
    z = torch.randn(20, 6, dtype=torch.float64)
    post = EfficientCoding(ObjectiveConfig(on="post"), torch.tanh)(z, 20, 6)
    a = torch.tanh(z) - torch.tanh(z).mean(0)
    pre = EfficientCoding(ObjectiveConfig(), torch.tanh)(a, 20, 6)
    torch.testing.assert_close(post, pre)
    check = EfficientCoding(ObjectiveConfig(on="post"), torch.tanh)
    torch.autograd.gradcheck(lambda z: check(z, 20, 6).loss, z.requires_grad_())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"noise_variance": 0.1, "epsilon_squared": 0.5}, "set one of them to null"),
        ({"noise_variance": 0.0}, "noise_variance=0.0"),
        ({"l1": -1.0}, "l1=-1.0"),
        ({"power": float("nan")}, "power=nan"),
        ({"scope": "both"}, "layerwise or network"),
    ],
)
def test_contradictions_name_the_value_and_the_remedy(fields, named):
    with pytest.raises(InputError, match=named):
        ObjectiveConfig(**fields).validate()


def test_soft_threshold_is_the_proximal_map():
    weight = torch.randn(50, 20, dtype=torch.float64)
    threshold = torch.rand(50, 1, dtype=torch.float64)
    slow = weight.sign() * (weight.abs() - threshold).clamp(min=0)
    soft_threshold(weight, threshold)
    torch.testing.assert_close(weight, slow)
    assert (weight == 0).any()
