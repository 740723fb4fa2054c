"""What maximises the rates is known in closed form where everything is linear."""

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from dense2conv.objectives import gaussian_information, limit_power, on_sphere, rate_reduction

NOISE = 0.3


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    """(4000, 10), centred, with eigenvalues from 4 down to 0.02 in a random basis."""
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(4000, 10, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=torch.float64)).Q
    scales = torch.logspace(0.6, -1.7, 10, dtype=torch.float64).sqrt()
    x = (white * scales) @ basis.T
    return x - x.mean(0)


def maximise(value, weight: Tensor, steps: int = 100) -> Tensor:
    weight = weight.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=steps, tolerance_grad=1e-10, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = -value(weight)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def random_weight(d: int, num_inputs: int = 10) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(d, num_inputs, generator=generator, dtype=torch.float64)


def test_orthonormal_rows_span_the_principal_subspace(inputs):
    def orthonormal(weight):
        return torch.linalg.qr(weight.T).Q.T

    found = maximise(
        lambda w: gaussian_information(inputs @ orthonormal(w).T, NOISE), random_weight(4)
    )
    principal = torch.linalg.eigh(inputs.T @ inputs).eigenvectors[:, -4:]
    cosines = torch.linalg.svdvals(orthonormal(found) @ principal)
    assert float(cosines.min()) > 1 - 1e-6


def test_limited_weights_fill_water(inputs):
    power = 6.0

    def limited(weight):
        return weight * (power**0.5 / weight.norm())

    found = limited(
        maximise(
            lambda w: gaussian_information(inputs @ limited(w).T, NOISE), random_weight(10), 400
        )
    )
    variance, basis = torch.linalg.eigh(inputs.T @ inputs / len(inputs))
    floor = NOISE / variance  # of each direction; water stands at ν above zero
    levels = torch.stack([(power + floor.sort().values[:n].sum()) / n for n in range(1, 11)])
    level = levels[[n - 1 for n in range(1, 11) if levels[n - 1] > floor.sort().values[n - 1]][-1]]
    gains = (level - floor).clamp(min=0)
    assert 0 < int((gains == 0).sum()) < 9
    torch.testing.assert_close(
        basis.T @ found.T @ found @ basis, torch.diag(gains), rtol=0, atol=2e-3
    )


def test_limited_power_of_the_features_whitens(inputs):
    power = 5.0
    found = maximise(
        lambda w: gaussian_information(limit_power(inputs @ w.T, power), NOISE),
        3 * random_weight(10),
        400,
    )
    z = limit_power(inputs @ found.T, power)
    covariance = z.T @ z / len(z)
    torch.testing.assert_close(
        covariance, power / 10 * torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-4
    )


def test_linear_rate_reduction_separates_as_discriminant_analysis_does():
    digits = load_digits()
    x = torch.tensor(digits.data)
    x = (x - x.mean(0)) / x.std()
    y = torch.tensor(digits.target)
    train, test = torch.arange(len(x)) % 3 > 0, torch.arange(len(x)) % 3 == 0

    weight = maximise(
        lambda w: rate_reduction(on_sphere(x[train] @ w.T), y[train], 0.5),
        random_weight(32, 64),
        60,
    )
    lda = LinearDiscriminantAnalysis()
    reference = lda.fit(x[train], y[train]).score(x[test], y[test])

    def accuracy(w: Tensor) -> float:
        """Of the class whose principal subspace holds most of a sample."""
        z = on_sphere(x @ w.T)
        held = []
        for k in range(10):
            _, _, basis = torch.linalg.svd(z[train & (y == k)], full_matrices=False)
            held.append((z[test] @ basis[:4].T).square().sum(1))
        return float((torch.stack(held, 1).argmax(1) == y[test]).double().mean())

    assert accuracy(weight) >= reference - 0.01
    assert accuracy(weight) >= accuracy(random_weight(32, 64)) + 0.02
