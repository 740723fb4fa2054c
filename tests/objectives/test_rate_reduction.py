"""Rate reduction against its formula: hard and soft classes, every layout, what degenerates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dense2conv.objectives import (
    CodingRate,
    RateReduction,
    class_coding_rate,
    coding_rate,
    logdet_i_plus,
    rate_reduction,
)
from dense2conv.objectives.gram import symmetric_product
from dense2conv.parallel import ParallelConfig, open_mesh
from dense2conv.shapes import SINGLE, InputError
from tests import oracles
from tests.ranks import on_ranks


def features(m, d, seed=0, dtype=torch.float64):
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(m, num_classes, seed=0):
    """Classes of very different sizes, some empty, some samples without one."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(m, generator=generator).square() * (num_classes + 1)).long() - 1


def memberships(m, num_classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    soft = torch.rand(m, num_classes, generator=generator, dtype=torch.float64)
    return soft * (torch.rand(m, num_classes, generator=generator) > 0.3)  # with exact zeros


def one_hot(y, num_classes):
    return torch.stack([(y == k).double() for k in range(num_classes)], dim=1)


def values_and_gradients(value, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    result = value(*inputs)
    return [result.detach(), *torch.autograd.grad(result, inputs)]


SHAPES = st.tuples(st.integers(1, 18), st.integers(1, 18), st.integers(1, 18))


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, epsilon_squared=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_labels_give_the_formula_and_its_gradient(shape, epsilon_squared, seed):
    m, d, num_classes = shape
    z, y = features(m, d, seed), labels(m, num_classes, seed)
    found = values_and_gradients(lambda z: rate_reduction(z, y, epsilon_squared), z)
    pi = one_hot(y, num_classes)
    expected = values_and_gradients(lambda z: oracles.rate_reduction(z, pi, epsilon_squared), z)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, epsilon_squared=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_memberships_give_the_formula_and_both_its_gradients(shape, epsilon_squared, seed):
    m, d, num_classes = shape
    z, pi = features(m, d, seed), memberships(m, num_classes, seed)
    pi = torch.where(pi.sum(0) > 0, pi, 0.5)  # an empty soft class has no derivative
    found = values_and_gradients(lambda z, pi: rate_reduction(z, pi, epsilon_squared), z, pi)
    expected = values_and_gradients(
        lambda z, pi: oracles.rate_reduction(z, pi, epsilon_squared), z, pi
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("m", "d"), [(12, 5), (5, 12), (1, 4), (4, 1)])
def test_classes_that_degenerate(m, d):
    z = features(m, d)
    one_class = torch.full((m,), 7)
    assert float(rate_reduction(z, one_class, 0.5)) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(class_coding_rate(z, one_class, 0.5), coding_rate(z, 0.5))
    own_classes, pi = torch.arange(m), torch.eye(m, dtype=torch.float64)
    torch.testing.assert_close(
        rate_reduction(z, own_classes, 0.5), oracles.rate_reduction(z, pi, 0.5)
    )
    unknown = torch.full((m,), -1)
    torch.testing.assert_close(rate_reduction(z, unknown, 0.5), coding_rate(z, 0.5))
    nobody = torch.zeros(m, 3, dtype=torch.float64).requires_grad_()
    value = rate_reduction(z, nobody, 0.5)
    (gradient,) = torch.autograd.grad(value, nobody)
    torch.testing.assert_close(value, coding_rate(z, 0.5))
    assert gradient.isfinite().all()


def test_large_classes_that_cover_all_samples():
    z, y = features(43, 6), torch.arange(43) % 4
    found = values_and_gradients(lambda z: rate_reduction(z, y, 0.1), z)
    pi = one_hot(y, 4)
    expected = values_and_gradients(lambda z: oracles.rate_reduction(z, pi, 0.1), z)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("m", "d"), [(9, 4), (4, 9), (6, 6)])
def test_labels_and_their_one_hot_memberships_agree(m, d):
    z, y = features(m, d), labels(m, 3)
    torch.testing.assert_close(
        rate_reduction(z, y, 0.1), rate_reduction(z, one_hot(y, 3), 0.1), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize(("m", "d"), [(7, 3), (3, 7), (4, 4)])
def test_differentiable_twice(m, d):
    z, y = features(m, d).requires_grad_(), labels(m, 3)
    pi = memberships(m, 3).clamp(min=0.1).requires_grad_()
    check = torch.autograd.gradgradcheck
    assert torch.autograd.gradcheck(lambda z: rate_reduction(z, y, 0.5), z)
    assert check(lambda z: logdet_i_plus(z, 0.3), z)
    assert check(lambda z: rate_reduction(z, y, 0.5), z)
    assert check(lambda z, pi: rate_reduction(z, pi, 0.5), (z, pi))
    assert check(lambda z: CodingRate(0.5)(z), z)
    assert check(lambda z: CodingRate(0.5, "power")(3 * z), z)


def test_the_modules_are_minus_the_functions_of_bounded_features():
    z, y = features(10, 4), labels(10, 3)
    unit = z / z.norm(dim=1, keepdim=True)
    torch.testing.assert_close(RateReduction(0.3)(z, y), -rate_reduction(unit, y, 0.3))
    torch.testing.assert_close(CodingRate(0.3)(z), -coding_rate(unit, 0.3))
    power = z.square().sum(1).mean()
    limited = 2 * z * (4 / (4 * power)).sqrt()
    torch.testing.assert_close(CodingRate(0.3, "power")(2 * z), -coding_rate(limited, 0.3))
    torch.testing.assert_close(CodingRate(0.3, "power")(z / 9), -coding_rate(z / 9, 0.3))
    torch.testing.assert_close(CodingRate(0.3, "none")(z), -coding_rate(z, 0.3))
    assert CodingRate(0.3)(torch.zeros(5, 3)) == 0


@pytest.mark.parametrize("n", [1, 100, 128, 129, 300, 517])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_the_symmetric_product_is_the_product(n, batch):
    rows = features(n, 7).expand(*batch, n, 7)
    torch.testing.assert_close(symmetric_product(rows), rows @ rows.mT)
    columns = features(7, n).mT.expand(*batch, n, 7)
    torch.testing.assert_close(symmetric_product(columns), columns @ columns.mT)


KINDS = ["collapsed", "rank_ten", "duplicated", "constant", "zero", "plain"]


def hard_features(kind, m, d):
    z = features(m, d, 3)
    return {
        "collapsed": torch.ones(m, d).double() + 1e-4 * z,
        "rank_ten": features(m, 10, 4) @ features(10, d, 5),
        "duplicated": z[:, :1].expand(m, d).clone(),
        "constant": torch.full((m, d), 0.5).double(),
        "zero": torch.zeros(m, d).double(),
        "plain": z,
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epsilon_squared", [1e-6, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("m", "d"), [(160, 48), (48, 160)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hard_numbers_keep_the_gradient_within_a_thousandth(kind, epsilon_squared, m, d, dtype):
    z, y = hard_features(kind, m, d).to(dtype), torch.arange(m) % 5
    found = values_and_gradients(lambda z: rate_reduction(z, y, epsilon_squared), z)
    alpha = d / (m * epsilon_squared)

    def rate(z):
        return 0.5 * oracles.logdet_i_plus(z, alpha)

    def class_rate(z):
        terms = [
            oracles.logdet_i_plus(z[y == k], alpha * m / int((y == k).sum())) for k in range(5)
        ]
        return sum(int((y == k).sum()) / (2 * m) * term for k, term in enumerate(terms))

    exact = values_and_gradients(lambda z: rate(z) - class_rate(z), z.double())
    assert all(bool(x.isfinite().all()) for x in found)
    assert found[1].dtype == dtype
    # The two rates' gradients may cancel, so their own sizes are the measure. What is stored in 8
    # or 11 bits is rounded, and fp16 has steps of 6e-8 at the least.
    sizes = [values_and_gradients(part, z.double())[1] for part in (rate, class_rate)]
    scale = sum(float(size.norm()) for size in sizes)
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    floor = 6e-8 * (m * d) ** 0.5 if dtype == torch.float16 else 0
    assert float((found[1].double() - exact[1]).norm()) <= tolerance * scale + floor
    rates = coding_rate(z, epsilon_squared), class_coding_rate(z, y, epsilon_squared)
    assert float(rates[0].double() - rates[1] - exact[0]) == pytest.approx(
        0, abs=1e-4 * (1 + float(rates[0]))
    )


def test_nan_is_reported_with_the_layers_name():
    z = features(6, 4)
    z[2, 1] = float("nan")
    with pytest.raises(ValueError, match="features of layer2 hold NaN or Inf"):
        rate_reduction(z, labels(6, 2), 0.5, name="layer2")
    with pytest.raises(ValueError, match="features of layer3 hold NaN or Inf"):
        RateReduction(0.5, bound="none", name="layer3")(z, memberships(6, 2))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), "one class for each sample"),
        (torch.zeros(6), "give integers"),
        (torch.zeros(6, 2, dtype=torch.int64), "real memberships"),
        (torch.full((6, 2), -0.5), "12 memberships are negative"),
    ],
)
def test_wrong_labels_are_named(y, message):
    with pytest.raises(InputError, match=message):
        rate_reduction(features(6, 4), y, 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: coding_rate(features(3, 2), 0.0), "epsilon_squared=0.0"),
        (lambda: CodingRate(bound="cube"), "sphere, power or none"),
        (lambda: CodingRate(batch_scope="mine"), "global or local"),
    ],
)
def test_wrong_parameters_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


CASES = [(13, 6, 4), (6, 13, 4), (8, 8, 8), (3, 2, 2), (24, 5, 2)]
LAYOUTS = [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1)]  # dp, tp


def _penalised(z, y, pi, layout, m, d):
    """A loss of each kind, and of a gradient: everything that a caller may differentiate."""
    hard = rate_reduction(z, y, 0.4, layout, m, d)
    soft = rate_reduction(z, pi, 0.4, layout, m, d)
    unit = CodingRate(0.4, "sphere", layout)
    return hard, soft, class_coding_rate(z, y, 0.4, layout, m, d), unit.bounded(z)


def _sharded(dp, tp):
    worst = {}
    with open_mesh(ParallelConfig(dp=dp, tp=tp)) as mesh:
        for m, d, num_classes in CASES:
            z, y = features(m, d), labels(m, num_classes)
            y = y.clamp(min=0) if m > 4 * d else y  # every sample in a class of many
            pi = memberships(m, num_classes).clamp(min=0.05)
            rows, columns = mesh.dp.shard(m), mesh.tp.shard(d)
            block = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
            whole, part = z.clone().requires_grad_(), z[block].clone().requires_grad_()
            whole_pi = pi.clone().requires_grad_()
            part_pi = pi[block[0]].clone().requires_grad_()
            for name, expected, found in zip(
                ["hard", "soft", "class"],
                _penalised(whole, y, whole_pi, SINGLE, m, d)[:3],
                _penalised(part, y[block[0]], part_pi, mesh.layout, m, d)[:3],
                strict=True,
            ):
                inputs = (
                    ([whole], [part]) if name != "soft" else ([whole, whole_pi], [part, part_pi])
                )
                a = torch.autograd.grad(expected, inputs[0], create_graph=True)
                b = torch.autograd.grad(found, inputs[1], create_graph=True)
                errors = [float((found - expected).abs()), float((b[0] - a[0][block]).norm())]
                if name == "soft":
                    errors.append(float((b[1] - a[1][block[0]]).norm()))
                # A second derivative: of the squared norm of the whole gradient.
                second = torch.autograd.grad(a[0].square().sum(), whole, retain_graph=True)[0]
                own = torch.autograd.grad(b[0].square().sum(), part, retain_graph=True)[0]
                errors.append(float((own - second[block]).norm()))
                worst[name, m, d] = max(errors)
            unit = _penalised(part, y[block[0]], part_pi, mesh.layout, m, d)[3]
            expected = (z / z.norm(dim=1, keepdim=True))[block]
            worst["sphere", m, d] = float((unit - expected).norm())
    return worst


@pytest.mark.parametrize(("dp", "tp"), LAYOUTS)
def test_sharded_values_and_all_derivatives_are_those_of_the_whole(dp, tp):
    for worst in on_ranks(dp * tp, _sharded, dp, tp):
        assert {case: error for case, error in worst.items() if not error < 1e-9} == {}
