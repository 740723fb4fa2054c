"""Work done in advance by threads, in order, and never more than a bounded amount of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from dense2conv.data.source import Images, ImageSource, WrappedSource
from dense2conv.shapes import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """``function`` of each item, in order, computed at most ``ahead`` items before it is asked for."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Prefetched(WrappedSource):
    """A source whose next ``depth`` training batches are read while one is computed with.

    Those that ``failure_ahead`` waits for come on top. Batches are a function of the step, so reading
    ahead changes nothing: whoever asks for another step, or other rows, gets them as well, only later.
    Pixels are in pinned memory where there is a GPU.
    """

    def __init__(self, source: ImageSource, depth: int) -> None:
        super().__init__(source)
        self._depth = depth
        self._least = 0  # batches that are waited for in advance
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._futures: dict[tuple[int, int, range], Future[Images]] = {}

    def read(self, step: int, batch: int, rows: range) -> Images:
        self._last = step, batch, rows
        wanted = [(step + n, batch, rows) for n in range(self._least + self._depth + 1)]
        for stale in self._futures.keys() - set(wanted):
            self._futures.pop(stale).cancel()
        for key in wanted:
            self._begin(key)
        return self._futures.pop(wanted[0]).result()

    def failure_ahead(self, num_batches: int) -> Exception | None:
        self._least = max(self._least, num_batches)
        step, batch, rows = self._last
        for key in [(step + n, batch, rows) for n in range(1, num_batches + 1)]:
            failure = self._begin(key).exception()
            if isinstance(failure, OSError | InputError):  # others are raised at their own step
                return failure
        return None

    def _begin(self, key: tuple[int, int, range]) -> Future[Images]:
        if key not in self._futures:
            self._futures[key] = self._thread.submit(self._read_pinned, *key)
        return self._futures[key]

    def _read_pinned(self, step: int, batch: int, rows: range) -> Images:
        images = self._source.read(step, batch, rows)
        if not torch.cuda.is_available():
            return images
        return Images(images.pixels.pin_memory(), images.labels)
