"""What ends a run early: all processes agree on the step, save, and say why.

Signals that ask for it, which end it with a code of its own, and images that cannot be read any more.
"""

from __future__ import annotations

import signal
from collections import deque
from typing import Any

import torch
from torch import Tensor

from dense2conv.parallel import Mesh
from dense2conv.parallel.faults import Agreed
from dense2conv.shapes import InputError

EX_REQUEUE = 85  # exit code of a run that was asked to stop and saved: start it again to carry on

# Schedulers send the first two, a terminal the last.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_LEAD = 3  # steps a pipeline stage may be ahead of the next one: two batches in flight, and its own


class Stopped(Agreed):
    """A signal ended the run after a whole step, which is saved."""


class StopRequest:
    """SIGTERM, SIGUSR1, the first Ctrl-C or a lost set inside a ``with`` block, agreed by all processes.

    After each step every process starts to add up what all have received, and looks at the sum a
    fixed number of steps later. By then it is there, even from a pipeline stage that lags behind:
    nobody waits, and all stop after the same step. The block is left by ``ending()``; one that ends by
    itself hands on the signals that came too late. A second Ctrl-C interrupts at once.

    Args:
        mesh: the mesh.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._delay = 1 + _LEAD * (mesh.pp.size - 1)  # steps
        self._received = torch.zeros(len(_SIGNALS) + 1, dtype=torch.bool)  # the last: images
        self._failure: str | None = None  # to read this process's images
        self._sums: deque[tuple[Any, Tensor]] = deque()  # of the latest steps, on their way
        self._previous: dict[int, Any] = {}
        self.reason = ""  # names of signals
        self._images_fail = False

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is None:
            while self._sums:
                self._received |= self._arrived()
            for number in _named(self._received):
                signal.raise_signal(number)

    @property
    def notice(self) -> int:
        """Batches in advance that have to be there, so that all can stop before one that is not."""
        return self._delay + 1

    def report(self, failure: Exception | None) -> None:
        """Stop in time, if one of the next ``notice`` batches cannot be read."""
        if failure is not None:
            self._failure = str(failure)
            self._received[-1] = True

    def requested(self) -> bool:
        """Whether to stop now; every process asks once after each step."""
        total = self._received.int()
        self._sums.append((self._mesh.begin_sum(total), total))
        if len(self._sums) > self._delay:
            asked = self._arrived()
            self._received |= asked
            self.reason = " and ".join(number.name for number in _named(asked))
            self._images_fail = bool(asked[-1])
        return bool(self.reason) or self._images_fail

    def ending(self, step: int, num_steps: int) -> Exception:
        """What to leave the block with behind a step that is saved; every process calls this."""
        if not self._images_fail:
            return Stopped(
                f"stopped by {self.reason} after step {step} of {num_steps}, which is saved"
            )
        failure = next(filter(None, self._mesh.gather_objects(self._failure)))
        return InputError(
            f"{failure}; step {step} of {num_steps} is saved: carry on from there with resume=true"
        )

    def _arrived(self) -> Tensor:
        work, total = self._sums.popleft()
        work.wait()
        return total > 0

    def _receive(self, number: int, _frame: object) -> None:
        self._received[_SIGNALS.index(number)] = True
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])


def _named(received: Tensor) -> list[signal.Signals]:
    return [number for number, there in zip(_SIGNALS, received.tolist(), strict=False) if there]
