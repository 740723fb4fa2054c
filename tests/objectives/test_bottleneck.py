"""The information bottleneck: its formula, its two bounds, and what β does."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from dense2conv.objectives.bottleneck import (
    VariationalInformationBottleneck,
    code_noise,
    reparameterised,
    vib_loss,
)
from dense2conv.objectives.sums import total
from dense2conv.parallel import ParallelConfig, open_mesh
from dense2conv.shapes import SINGLE, InputError
from tests.ranks import on_ranks


def _case(m, d, num_classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean, log_variance = torch.randn(2, m, d, generator=generator, dtype=torch.float64)
    logits = torch.randn(m, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (m,), generator=generator)
    return mean, log_variance, logits, labels


def _slow_terms(mean, log_variance, logits, labels):
    """Cross-entropy, KL and H(Y) from their definitions, one sample at a time."""
    codes = torch.distributions.Normal(mean, (log_variance / 2).exp())
    unit = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    kl = torch.distributions.kl_divergence(codes, unit).sum() / len(mean)
    chosen = [row.softmax(0)[y].log() for row, y in zip(logits, labels, strict=True)]
    frequencies = [float((labels == y).double().mean()) for y in range(logits.shape[1])]
    label_entropy = -sum(p * math.log(p) for p in frequencies if p > 0)
    return -torch.stack(chosen).mean(), kl, label_entropy


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 12),
    d=st.integers(1, 12),
    num_classes=st.integers(1, 5),
    beta=st.floats(0, 10),
    seed=st.integers(0, 1000),
)
def test_terms_and_gradients_are_the_formula(m, d, num_classes, beta, seed):
    *inputs, labels = _case(m, d, num_classes, seed)
    ours = [t.clone().requires_grad_() for t in inputs]
    slow = [t.clone().requires_grad_() for t in inputs]
    terms = vib_loss(*ours, labels, beta)
    cross_entropy, kl, label_entropy = _slow_terms(*slow, labels)
    terms.loss.backward()
    (cross_entropy + beta * kl).backward()
    torch.testing.assert_close(terms.cross_entropy, cross_entropy)
    torch.testing.assert_close(terms.kl, kl)
    assert float(terms.label_entropy) == pytest.approx(label_entropy, abs=1e-12)
    for fast, reference in zip(ours, slow, strict=True):
        torch.testing.assert_close(fast.grad, reference.grad)


def test_it_can_be_differentiated_twice():
    *inputs, labels = _case(4, 3, 3)
    inputs = [t.requires_grad_() for t in inputs]
    loss = VariationalInformationBottleneck(0.3)
    assert torch.autograd.gradcheck(lambda *args: loss(*args, labels), inputs)
    assert torch.autograd.gradgradcheck(lambda *args: loss(*args, labels), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_full(dtype):
    *inputs, labels = _case(200, 16, 4)
    half = [t.to(dtype) for t in inputs]
    terms = vib_loss(*half, labels, 0.5)
    expected = vib_loss(*(t.double() for t in half), labels, 0.5)
    assert terms.loss.dtype == torch.float32
    torch.testing.assert_close(terms.loss.double(), expected.loss, rtol=1e-5, atol=0)


# Two classes y = ±1 in one input, x = y a + s n, coded as z = w x + σ ε: every quantity is an
# integral.
_A, _S, _W = 1.0, 0.6, 0.9
_POINTS = 2**15  # of a low-discrepancy sequence: integrates to about 1e-3


def _gaussian_mixture():
    """(x, labels, noise) that stand for the whole distribution."""
    points = torch.quasirandom.SobolEngine(3, scramble=True, seed=0).draw(_POINTS).double()
    points = points.clamp(1e-9, 1 - 1e-9)
    labels = (points[:, 0] < 0.5).long()
    x = (2 * labels - 1) * _A + _S * torch.special.ndtri(points[:, 1])
    return x[:, None], labels, torch.special.ndtri(points[:, 2:])


def _true_informations(sigma):
    """I(Z;Y) and I(X;Z), by integrating the density of z."""
    variance = (_W * _S) ** 2 + sigma**2

    def density(z):
        peaks = [math.exp(-((z - y * _W * _A) ** 2) / (2 * variance)) for y in (-1, 1)]
        return sum(peaks) / 2 / math.sqrt(2 * math.pi * variance)

    edge = _W * _A + 12 * math.sqrt(variance)
    entropy = quad(lambda z: -density(z) * math.log(max(density(z), 1e-300)), -edge, edge)[0]
    given_y, given_x = (0.5 * math.log(2 * math.pi * math.e * v) for v in (variance, sigma**2))
    return entropy - given_y, entropy - given_x


@pytest.mark.parametrize("sigma", [0.2, 0.6, 1.5])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 2.0])
def test_the_bounds_are_ordered_around_the_true_informations(sigma, sharpness):
    x, labels, noise = _gaussian_mixture()
    mean = _W * x
    log_variance = torch.full_like(mean, 2 * math.log(sigma))
    z = reparameterised(mean, log_variance, noise)
    optimal = 2 * _W * _A / ((_W * _S) ** 2 + sigma**2) * z  # log p(y=1|z) - log p(y=-1|z)
    logits = torch.cat([torch.zeros_like(z), sharpness * optimal], 1)
    terms = vib_loss(mean, log_variance, logits, labels, 0.1)
    about_label, about_input = _true_informations(sigma)
    lower = float(terms.label_information_lower_bound)
    upper = float(terms.input_information_upper_bound)
    assert about_label < about_input < upper
    if sharpness == 1:
        assert lower == pytest.approx(about_label, abs=1e-3)  # the decoder is p(y|z)
    else:
        assert lower < about_label - 0.005


@pytest.mark.parametrize("w", [0.1, 0.6, 0.99])
def test_the_rate_is_the_information_where_the_codes_are_standard_normal(w):
    x = torch.special.ndtri((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000)[:, None]
    labels = torch.zeros(len(x), dtype=torch.long)
    logits = torch.zeros(len(x), 1, dtype=torch.float64)

    def rate(mean, variance):
        return float(vib_loss(mean, torch.full_like(x, variance).log(), logits, labels, 1.0).kl)

    information = -0.5 * math.log(1 - w**2)
    assert rate(w * x, 1 - w**2) == pytest.approx(information, abs=1e-3)
    # Scaled codes tell just as much, but their marginal is not N(0, I).
    assert rate(2 * w * x, 4 * (1 - w**2)) > information + 0.1


def _trained(beta):
    """A linear encoder and decoder on four Gaussian classes: the terms with fresh noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(512) % 4
    corners = torch.tensor([[2.0, 0], [0, 2], [-2, 0], [0, -2]])
    x = corners[labels] + 0.5 * torch.randn(512, 2, generator=generator)
    encoder = (0.3 * torch.randn(2, 4, generator=generator)).requires_grad_()
    decoder = (0.3 * torch.randn(2, 4, generator=generator)).requires_grad_()
    spread = torch.zeros(2).requires_grad_()
    optimizer = torch.optim.Adam([encoder, decoder, spread], lr=0.03)
    objective = VariationalInformationBottleneck(beta)

    def inputs(step):
        mean = x @ encoder[:, :2]
        log_variance = spread.expand_as(mean)
        z = reparameterised(mean, log_variance, code_noise((0, step), 512, 2))
        return mean, log_variance, z @ decoder, labels

    for step in range(400):
        optimizer.zero_grad()
        objective(*inputs(step)).backward()
        optimizer.step()
    with torch.no_grad():
        return vib_loss(*inputs(10_000), beta)


def test_beta_trades_information_about_the_input_for_information_about_the_label():
    weak, middle, strong, beyond = (_trained(beta) for beta in (1e-3, 0.2, 0.6, 1.5))
    rates = [float(t.input_information_upper_bound) for t in (weak, middle, strong, beyond)]
    about_label = [float(t.label_information_lower_bound) for t in (weak, middle, strong, beyond)]
    assert rates == sorted(rates, reverse=True)
    assert about_label == sorted(about_label, reverse=True)
    assert about_label[0] > 0.95 * math.log(4)
    assert rates[0] > 4
    for lower, upper in zip(about_label, rates, strict=True):
        assert lower <= upper + 1e-3
    # From β = 1 nothing is worth its price: the optimum is a collapsed code, of loss H(Y).
    assert rates[3] < 1e-3
    assert float(beyond.loss) == pytest.approx(math.log(4), abs=1e-2)


def test_noise_is_the_same_on_any_mesh_and_standard_normal():
    noise = code_noise((3, 2), 4000, 6)
    assert torch.equal(noise, code_noise((3, 2), 4000, 6))
    assert not torch.equal(noise, code_noise((3, 3), 4000, 6))
    assert float(noise.mean()) == pytest.approx(0, abs=0.03)
    assert float(noise.std()) == pytest.approx(1, abs=0.03)
    mean = torch.full((4000, 6), 2.0)
    z = reparameterised(mean, torch.full((4000, 6), 2 * math.log(3.0)), noise)
    torch.testing.assert_close(z, 2 + 3 * noise)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_and_inf_are_named_not_passed_on(bad, which):
    *inputs, labels = _case(5, 3, 4)
    inputs[which][2, 1] = bad
    with pytest.raises(ValueError, match=r"layer 7.*NaN or Inf"):
        vib_loss(*inputs, labels, 0.1, name="layer 7")


def test_mistakes_name_the_value_and_the_remedy():
    mean, log_variance, logits, labels = _case(5, 3, 4)
    with pytest.raises(InputError, match="beta=-1"):
        VariationalInformationBottleneck(-1)
    with pytest.raises(InputError, match="beta=nan"):
        vib_loss(mean, log_variance, logits, labels, float("nan"))
    with pytest.raises(InputError, match=r"\(5, 2\).*\(samples, units\)"):
        vib_loss(mean, log_variance[:, :2], logits, labels, 0.1)
    with pytest.raises(InputError, match=r"\(4, 4\).*give \(5, classes\)"):
        vib_loss(mean, log_variance, logits[:4], labels, 0.1)
    with pytest.raises(InputError, match="give integers"):
        vib_loss(mean, log_variance, logits, labels.double(), 0.1)
    for stranger in (-100, 4):
        labels[2] = stranger
        with pytest.raises(InputError, match="1 of 5 labels"):
            vib_loss(mean, log_variance, logits, labels, 0.1)


_SHAPES = [(9, 5), (4, 4), (5, 2), (1, 3)]  # uneven, even, and with empty shards


def _first_and_second(value, inputs, layout):
    """The gradients g, and those of Σ g·cos(input): (2 × inputs)."""
    gradients = torch.autograd.grad(value, inputs, create_graph=True)
    products = [(g * t.detach().cos()).sum() for g, t in zip(gradients, inputs, strict=True)]
    code = total(products[0] + products[1], layout.samples, layout.features)
    logits = total(products[2], layout.samples)  # the same along tp
    return [*gradients, *torch.autograd.grad(code + logits, inputs)]


def _spread(sizes):
    """Errors on own blocks, over all shapes; and whether one stranger is an error here."""
    dp, tp = sizes
    errors = []
    with open_mesh(ParallelConfig(dp=dp, tp=tp)) as mesh:
        for m, d in _SHAPES:
            *inputs, labels = _case(m, d, 3, seed=m)
            rows, units = (np.s_[r.start : r.stop] for r in (mesh.dp.shard(m), mesh.tp.shard(d)))
            blocks = [(rows, units), (rows, units), (rows,)]
            whole = [t.clone().requires_grad_() for t in inputs]
            expected = vib_loss(*whole, labels, 0.3)
            slow = _first_and_second(expected.loss, whole, SINGLE)

            own = [t[b].clone().requires_grad_() for t, b in zip(inputs, blocks, strict=True)]
            terms = vib_loss(*own, labels[rows], 0.3, mesh.layout)
            fast = _first_and_second(terms.loss, own, mesh.layout)

            errors += [float((a - b).detach()) for a, b in zip(terms, expected, strict=True)]
            errors += [
                float((a - b[k]).norm()) for a, b, k in zip(fast, slow, blocks * 2, strict=True)
            ]
            noise = code_noise((1, 2), m, d, mesh.layout)
            errors.append(float((noise - code_noise((1, 2), m, d)[rows, units]).norm()))

        mean, log_variance, logits, labels = (
            t[: 2 * dp][mesh.dp.rank :: dp] for t in _case(9, 5, 3)
        )
        units = mesh.tp.shard(5)
        code = (t[:, units.start : units.stop] for t in (mean, log_variance))
        if mesh.dp.rank == dp - 1:
            labels[-1] = 3
        with pytest.raises(InputError, match=f"1 of {2 * dp} labels"):
            vib_loss(*code, logits, labels, 0.1, mesh.layout)
    return max(map(abs, errors))


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1)])
def test_spread_over_ranks_it_is_one_value_with_one_gradient(sizes):
    assert max(on_ranks(sizes[0] * sizes[1], _spread, sizes)) < 1e-9
