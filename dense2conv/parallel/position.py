"""How far each process is, where it runs, and whom the others wait for."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

_PACKAGE = str(Path(__file__).parent.parent)
_COMMUNICATION = (str(Path(__file__).parent), f"{os.sep}torch{os.sep}distributed")
_NAMED = 8  # ranks that a sentence names


class Phase(NamedTuple):
    """What a process is doing: phase ``number`` of those that all processes go through alike.

    A limited one may take ``parallel.timeout_s``, others take as long as they take.
    """

    name: str
    step: int
    number: int
    began: float
    limited: bool


class Position:
    """How far this process is, and what it has ``found`` to be wrong with its own share."""

    def __init__(self) -> None:
        self.now = Phase("start", 0, 0, time.monotonic(), limited=False)
        self.found = ""

    def enter(self, name: str, step: int = 0, limited: bool = True) -> None:
        """Begin a phase, of step ``step`` where there is one; it costs no more than the tuple."""
        self.now = Phase(name, step, self.now.number + 1, time.monotonic(), limited)


class Place(NamedTuple):
    """Where a rank runs."""

    host: str
    pid: int

    @classmethod
    def own(cls) -> Place:
        return cls(socket.gethostname(), os.getpid())

    def state(self) -> str:
        """The state of that process, a letter as in ``ps``, empty where it is gone; ``?`` elsewhere."""
        stat = self._stat()
        return "?" if stat is None else (stat[0] if stat else "")

    def is_sibling(self) -> bool:
        """Whether the process that started this one has started it."""
        stat = self._stat()
        return bool(stat) and stat is not None and int(stat[1]) == os.getppid()

    def _stat(self) -> list[str] | None:
        """The fields of /proc/PID/stat from the state on; none of a process that has ended."""
        if self.host != socket.gethostname() or not Path("/proc/self/stat").exists():
            return None
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return []
        return [] if fields[0] in "ZX" else fields


class Beat(NamedTuple):
    """A sign of life: a phase, and for how many seconds; the innermost line of this package, and
    whether it waits for others there; whether the process is ending; what it found.
    """

    ordinal: int
    phase: str
    step: int
    number: int
    seconds: float
    line: str
    waits: bool
    ending: bool
    found: str

    @property
    def where(self) -> str:
        return f"{self.phase} of step {self.step}" if self.step else self.phase


def beat(ordinal: int, position: Position, ending: bool) -> Beat:
    """This process's sign of life."""
    now = position.now
    line, waits = _line_of_main()
    seconds = time.monotonic() - now.began
    return Beat(
        ordinal, now.name, now.step, now.number, seconds, line, waits, ending, position.found
    )


def _line_of_main() -> tuple[str, bool]:
    """The innermost line of the main thread that is of this package, and whether it waits for others."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    waits = frame is not None and frame.f_code.co_filename.startswith(_COMMUNICATION[0])
    while frame is not None:
        name = frame.f_code.co_filename
        waits = waits or _COMMUNICATION[1] in name
        if name.startswith(_PACKAGE):
            return f"{os.path.relpath(name, _PACKAGE)}:{frame.f_lineno}", waits
        frame = frame.f_back
    return "", waits


def waited_for(beats: Sequence[Beat | None], silent: Iterable[int]) -> list[int]:
    """The ranks that the others wait for.

    Those without a sign of life come first, then the ones in the earliest phase, and within one
    phase those that compute or read rather than wait. Nobody waits for one that is ending.
    """
    quiet = set(silent)

    def order(rank: int) -> tuple[float, ...]:
        one = beats[rank]
        if one is None or rank in quiet:
            return (0,)
        return (1, one.ending, one.number, one.waits)

    first = min(map(order, range(len(beats))))
    return [rank for rank in range(len(beats)) if order(rank) == first]


def names(ranks: Sequence[int], places: Sequence[Place]) -> str:
    """Ranks with their hosts and processes."""
    shown = [f"rank {r} on {places[r].host} (process {places[r].pid})" for r in ranks[:_NAMED]]
    more = [f"{len(ranks) - _NAMED} more"] if len(ranks) > _NAMED else []
    return " and ".join([", ".join(shown), *more])


def fate(place: Place) -> str:
    """What became of a process that gives no sign of life."""
    known = {"": "was killed", "T": "was stopped by a signal"}
    return known.get(place.state(), "fell silent: killed, stopped or hung")


def blame(
    beats: Sequence[Beat | None], silent: Iterable[int], places: Sequence[Place], timeout_s: float
) -> str:
    """Whom the others wait for, where, and what to do, in a sentence."""
    ranks, quiet = waited_for(beats, silent), set(silent)
    one = beats[ranks[0]]
    where = f"in {one.where}" if one is not None else "nowhere"
    again = "carry on with resume=true" if one is not None and one.step else "start it again"
    who = names(ranks, places)
    if one is None or ranks[0] in quiet:
        remedy = "look at that host (dmesg tells whether its memory ran out)"
        return f"{who} {fate(places[ranks[0]])}, last seen {where}; {remedy}, then {again}"
    if len(ranks) == len(beats) > 1 or one.ending:
        return (
            f"all {len(beats)} processes, {who}, hang {where} and wait for each other; try the network "
            f"with dense2conv doctor, then {again}"
        )
    line = f" at {one.line}" if one.line else ""
    return (
        f"{who} hangs {where}, for {one.seconds:.0f} s now{line}; look at that host, its disk and its "
        f"device, then {again}; if it needs that long, raise parallel.timeout_s={timeout_s:g}"
    )
