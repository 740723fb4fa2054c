"""The optimizer's step is the proximal step of its own metric."""

import pytest
import torch
from torch import nn

from dense2conv.shapes import InputError
from dense2conv.training.optim import OptimizerConfig, ProxAdam, learning_rate, make_optimizer


def _linear(bias=True):
    layer = nn.Linear(5, 4, bias=bias, dtype=torch.float64)
    layer.weight.grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).double()
    if bias:
        layer.bias.grad = torch.ones(4, dtype=torch.float64)
    return layer


def test_a_step_minimises_its_quadratic_model_plus_l1():
    """argmin_u <g, u> + ½ Σ_r v_r‖u_r − w_r‖² / lr + λ‖u‖₁, row by row, by brute force."""
    layer = _linear(bias=False)
    before, lr, l1 = layer.weight.detach().clone(), 0.1, 0.3
    ProxAdam([{"params": [layer.weight], "l1": l1}], lr=lr).step()
    gradient = layer.weight.grad
    metric = gradient.square().mean(1).sqrt()  # first step: bias correction undoes the averaging
    for r in range(4):
        for j in range(5):
            u = torch.linspace(-2, 2, 400_001, dtype=torch.float64)
            w, g = before[r, j], gradient[r, j]
            cost = g * u + 0.5 * metric[r] / lr * (u - w).square() + l1 * u.abs()
            assert float(layer.weight.detach()[r, j]) == pytest.approx(
                float(u[cost.argmin()]), abs=2e-5
            )


def test_zeros_are_exact_and_biases_pay_nothing():
    layer = _linear()
    with torch.no_grad():
        layer.bias.fill_(0.05)
    make_optimizer(OptimizerConfig(lr=0.1), layer, l1=100.0).step()
    assert not layer.weight.any()
    assert layer.bias.all()


def test_one_full_size_state_only():
    layer = _linear(bias=False)
    optimizer = ProxAdam(layer.parameters())
    optimizer.step()
    sizes = [v.numel() for v in optimizer.state[layer.weight].values()]
    assert sum(sizes) <= layer.weight.numel() + layer.weight.shape[0] + 1


def test_a_dead_row_without_gradient_stays_finite():
    layer = _linear(bias=False)
    layer.weight.grad[2] = 0
    optimizer = make_optimizer(OptimizerConfig(), layer, l1=0.01)
    for _ in range(3):
        optimizer.step()
    assert layer.weight.isfinite().all()


def test_a_process_without_units_steps_with_the_others():
    weight = nn.Parameter(torch.empty(0, 5))
    weight.grad = torch.empty(0, 5)
    ProxAdam([{"params": [weight], "l1": 0.01}]).step()
    assert weight.shape == (0, 5)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
def test_a_torch_optimizer_is_followed_by_the_prox(name):
    layer, plain = _linear(), _linear()
    plain.load_state_dict(layer.state_dict())
    make_optimizer(OptimizerConfig(name=name, lr=0.1), layer, l1=0.5).step()
    getattr(torch.optim, name)(plain.parameters(), lr=0.1).step()
    expected = nn.functional.softshrink(plain.weight, 0.1 * 0.5)
    torch.testing.assert_close(layer.weight, expected)
    torch.testing.assert_close(layer.bias, plain.bias)


def test_the_schedule_warms_up_and_ends_low():
    config = OptimizerConfig(lr=1.0, warmup=10, final_lr=0.01)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9]
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(config, 100, 100) == pytest.approx(0.01)


@pytest.mark.parametrize("fields", [{"name": "Optimizer"}, {"name": "nn"}, {"lr": 0.0}])
def test_what_is_no_optimizer_is_named(fields):
    with pytest.raises(InputError):
        OptimizerConfig(**fields).validate()


def test_a_compiled_step_is_the_same_step():
    weights = []
    for compiled in (False, True):
        layer = _linear()
        with torch.no_grad():
            for p, seed in zip(layer.parameters(), (1, 2), strict=True):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        optimizer = make_optimizer(OptimizerConfig(), layer, l1=0.1, compiled=compiled)
        for step in range(5):  # another rate each time: compiled once all the same
            optimizer.param_groups[0]["lr"] = learning_rate(OptimizerConfig(), step, 5)
            optimizer.step()
        weights.append([p.detach().clone() for p in layer.parameters()])
    for eager, fused in zip(*weights, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-12, atol=1e-14)
