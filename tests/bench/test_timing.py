"""What the benchmarks say of times and memory."""

import time

import pytest
import torch

from dense2conv.bench.timing import Ratio, interleaved, peak_bytes


def test_a_ratio_is_paired_and_its_interval_holds_the_median():
    reference = [1.0, 2.0, 4.0, 8.0, 16.0] * 4
    times = [3 * x for x in reference]
    assert Ratio.of(times, reference) == Ratio(3.0, 3.0, 3.0, 20)
    noisy = Ratio.of([x * (1 + 0.01 * i) for i, x in enumerate(reference)], reference)
    assert noisy.low < noisy.median < noisy.high
    few = Ratio.of([1.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    assert (few.low, few.median, few.high) == (1.0, 2.0, 4.0)


def test_rounds_are_interleaved_and_stop_in_time_but_not_before_three():
    order = []
    works = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = interleaved(works, 5, 60)
    rounds = list(zip(order[::2], order[1::2], strict=True))
    assert len(rounds) == 6  # one to warm up
    assert set(rounds) == {("a", "b"), ("b", "a")}  # neither is always first
    assert [len(t) for t in times.values()] == [5, 5]
    calls = []
    slow = interleaved({"sleep": lambda: (calls.append(0), time.sleep(0.05))}, 50, 0.0, repeat=True)
    assert len(slow["sleep"]) == 3
    assert len(calls) > 3 + 1  # several a round
    assert slow["sleep"][0] == pytest.approx(0.05, rel=0.3)


def test_peak_memory_counts_what_is_held_at_once():
    megabyte = torch.empty(2**18)

    def work():
        first = megabyte + 1
        second = first + 1
        del first
        return (second + 1).sum()

    peak = peak_bytes(work, torch.device("cpu"))
    assert peak == pytest.approx(2 * 2**20, rel=0.01)
