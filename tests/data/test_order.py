"""Every epoch visits every image once, whoever asks for which samples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dense2conv.data.order import permuted, shuffled, uniform


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_permutation_visits_everything_once(length, seed, epoch):
    order = permuted(np.arange(length), length, seed, epoch)
    assert sorted(order) == list(range(length))


@given(st.integers(1, 50), st.integers(1, 20), st.data())
@settings(max_examples=60, deadline=None)
def test_any_cut_of_a_run_reads_the_same_images(num_images, batch, data):
    counters = np.arange(4 * num_images)
    whole = shuffled(counters, num_images, 7)
    parts = [
        shuffled(counters[i : i + batch], num_images, 7) for i in range(0, len(counters), batch)
    ]
    assert np.array_equal(np.concatenate(parts), whole)
    some = data.draw(st.lists(st.sampled_from(counters.tolist()), min_size=1))
    assert np.array_equal(shuffled(np.array(some), num_images, 7), whole[some])
    epochs = whole.reshape(4, num_images)
    assert (np.sort(epochs) == np.arange(num_images)).all()
    if num_images >= 20:
        assert len({tuple(epoch) for epoch in epochs}) == 4


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [permuted(np.arange(500), 500, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 10  # one on average
    assert abs(np.corrcoef(orders[0], np.arange(500))[0, 1]) < 0.15


def test_all_orders_of_few_images_are_equally_likely():
    found = {}
    for seed in range(2400):
        order = tuple(permuted(np.arange(4), 4, seed))
        found[order] = found.get(order, 0) + 1
    assert len(found) == 24
    chi_squared = sum((count - 100) ** 2 / 100 for count in found.values())
    assert chi_squared < 60  # 23 degrees of freedom: 49.7 is passed once in a thousand


def test_a_billion_images_need_no_table():
    places = permuted(np.array([0, 1, 10**9 - 1]), 10**9, 3)
    assert len(set(places.tolist())) == 3
    assert places.max() < 10**9


def test_places_are_uniform_and_independent():
    u = uniform(np.arange(20_000), 3, 5, 1)
    assert u.min() >= 0
    assert u.max() < 1
    assert np.allclose(u.mean(0), 0.5, atol=0.01)
    assert np.allclose(np.cov(u.T) * 12, np.eye(3), atol=0.03)
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03
    assert np.array_equal(uniform(np.array([777]), 3, 5, 1)[0], u[777])
    assert not np.allclose(uniform(np.arange(5), 3, 6, 1), u[:5])


@pytest.mark.parametrize("counters", [np.empty(0, np.int64)])
def test_no_samples_are_no_images(counters):
    assert len(shuffled(counters, 5, 0)) == 0
    assert uniform(counters, 3, 0).shape == (0, 3)
