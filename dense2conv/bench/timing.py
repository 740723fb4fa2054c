"""Ratios of times from interleaved rounds, peak memory, and what the machine can do at best.

A time on a shared machine means little; a ratio of two, taken one right after the other and often,
does. Each round runs every candidate in turn, in an order of its own, the quick ones several times in a
row, as training does.
"""

from __future__ import annotations

import gc
import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import quantile_test
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter

Work = Callable[[], object]

_MIN_ROUNDS = 3
_BLOCK_SECONDS = 0.2  # a candidate runs at least that long in each round


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios with its distribution-free 95 % interval (of order statistics)."""

    median: float
    low: float
    high: float
    num_pairs: int

    @classmethod
    def of(cls, times: Sequence[float], reference: Sequence[float]) -> Ratio:
        """Of ``times`` over those of ``reference``, round by round."""
        ratios = np.array(times) / np.array(reference)
        interval = quantile_test(ratios, q=1, p=0.5).confidence_interval(0.95)
        # With few pairs no order statistic is that sure: then the interval is all that was seen.
        low = ratios.min() if np.isnan(interval.low) else interval.low
        high = ratios.max() if np.isnan(interval.high) else interval.high
        return cls(float(np.median(ratios)), float(low), float(high), len(ratios))

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


def interleaved(
    candidates: Mapping[str, Work],
    num_rounds: int,
    seconds: float,
    synchronise: Work = lambda: None,
    repeat: bool = False,
) -> dict[str, list[float]]:
    """Seconds a call of every candidate in each of ``num_rounds`` rounds, after one to warm up.

    Stops early, though not before three rounds, when ``seconds`` have passed.

    Args:
        candidates: what to run, by name.
        num_rounds: the most rounds.
        seconds: after which no further round begins.
        synchronise: waits for the device, or for the other processes.
        repeat: run quick candidates several times in a row. Processes that communicate would have
            to agree on the number of times; there it is once.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    calls = dict.fromkeys(candidates, 1)
    began = time.perf_counter()
    for done in range(-1, num_rounds):
        if done >= _MIN_ROUNDS and time.perf_counter() - began > seconds:
            break
        # In another order every time, the same on all processes: what one leaves behind (caches, the
        # allocator's free blocks, an idle core) is not always the same other one's to find.
        for name, work in random.Random(done).sample(list(candidates.items()), len(candidates)):
            gc.collect(0)
            synchronise()
            start = time.perf_counter()
            for _ in range(calls[name]):
                work()
            synchronise()
            elapsed = (time.perf_counter() - start) / calls[name]
            if done >= 0:
                times[name].append(elapsed)
            elif repeat:
                calls[name] = max(1, round(_BLOCK_SECONDS / elapsed))
    return times


def peak_bytes(work: Work, device: torch.device) -> int:
    """The most that ``work`` holds at once in tensors, above what is held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return int(max(np.cumsum(sizes), default=0))


def matmul_flops(device: torch.device, size: int = 2048) -> float:
    """FLOP/s of a large fp32 matrix product, the best of five."""
    a = torch.randn(size, size, device=device)

    def work() -> None:
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()

    times = interleaved({"product": work}, 5, 30.0)["product"]
    return 2 * size**3 / min(times)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "matmul_gflops": round(matmul_flops(device) / 1e9, 1),
    }


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table as text, each column as wide as its longest word."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def plain(value: Any) -> Any:
    """``value`` for JSON: ratios as their fields, infinities and NaN as null."""
    if isinstance(value, Ratio):
        return {key: plain(number) for key, number in asdict(value).items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()
