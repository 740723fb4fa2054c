"""Who hangs, who is gone, who failed: every process tells the job's store how far it is, in a thread.

A collective that waits in vain names nobody, and over NCCL does not even raise. So whoever notices
that a run is over takes a ticket from the store. The first one speaks: it reads how far all are, says
in one sentence whom they wait for, and leaves a verdict in the store; the others end quietly.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist

from dense2conv.parallel.faults import Agreed, Fault, ToldElsewhere, say
from dense2conv.parallel.position import Beat, Place, Position, beat, blame, fate, names
from dense2conv.shapes import InputError

_TICK_S = 1.0  # between two signs of life; at most a tenth of the time-out
_SILENT = 3  # ticks without one
_ANSWER = 10  # ticks within which the store answers
_ENDING_S = 20.0  # of the time-out, at most half of it: to find out whom all wait for, and to end
_LAST_WORDS_S = 10.0  # for a process that ends by itself; at most a quarter of the time-out

Value = TypeVar("Value")


class Watch:
    """A ``with`` block that no process stays in when another one fails, hangs or is gone.

    Args:
        store: of the job.
        position: of this process, which moves on inside the block.
        places: of all ranks.
        rank: the own one.
        timeout_s: seconds after which whoever hangs has been named, and all have ended.

    Raises:
        Fault: another process is to blame.
        ToldElsewhere: another process says why the run has ended.
    """

    def __init__(
        self,
        store: dist.Store,
        position: Position,
        places: Sequence[Place],
        rank: int,
        timeout_s: float,
    ) -> None:
        # A connection of its own: the threads must not keep the step from the store, nor the step them.
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._position, self._places, self._rank = position, places, rank
        self._timeout_s = timeout_s
        self._tick = min(_TICK_S, timeout_s / 10)
        self._patience = timeout_s - min(_ENDING_S, timeout_s / 2)
        # Otherwise rank 0 keeps the store, and nobody hears anything when that is gone.
        self._kept_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._left, self._ending = threading.Event(), False
        self._count, self._heard = 0, False

    def __enter__(self) -> None:
        self._publish()
        for work in (self._tell_and_hear, self._wait_for_main):
            threading.Thread(target=work, daemon=True).start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._ending = True
        try:
            if isinstance(error, Exception) and not isinstance(error, Agreed):
                told = self._account_for(error)
                if told is not error:
                    raise told from error
            elif self._kept_by_launcher:  # rank 0 may have left, and its store with it
                with suppress(RuntimeError):
                    self._publish()
        finally:
            self._left.set()

    # ---- what the threads do

    def _tell_and_hear(self) -> None:
        """Give signs of life until the block is left, or until another process has spoken."""
        while not self._left.wait(self._tick):
            try:
                self._publish()
                silent = self._verdict()
            except RuntimeError:  # whoever keeps the store is gone, of which main will hear
                return
            last_words = min(_LAST_WORDS_S, self._timeout_s / 4)
            if silent is not None and not self._left.wait(last_words):
                os._exit(1)

    def _wait_for_main(self) -> None:
        """End the process when a limited phase takes too long.

        Time is counted in ticks: none goes by while the whole process is stopped, and goes on later.
        """
        seen, idle = -1, 0.0
        while not self._left.wait(self._tick):
            now = self._position.now
            idle = idle + self._tick if now.number == seen else 0.0
            seen = now.number
            if now.limited and idle >= self._patience and not self._ending:
                self._end_hung()

    def _end_hung(self) -> None:
        try:
            looked = self._ask(self._look_if_first)
            if looked is not None:
                beats, silent = looked
                say(Fault(blame(beats, silent, self._places, self._timeout_s)))
                self._ask(lambda: self._judge(silent))
        except Fault as fault:
            say(fault)
        os._exit(1)

    # ---- what the store is told, and tells

    def _publish(self) -> None:
        self._count += 1
        own = beat(self._count, self._position, self._ending)
        self._store.set(f"beat/{self._rank}", json.dumps(own))

    def _beats(self) -> list[Beat | None]:
        keys = [f"beat/{rank}" for rank in range(len(self._places))]
        found = [self._store.get(key) if self._store.check([key]) else None for key in keys]
        return [None if text is None else Beat(*json.loads(text)) for text in found]

    def _look_if_first(self) -> tuple[list[Beat | None], list[int]] | None:
        """How far all are, and who gives no sign of life; None, after its verdict, if another speaks."""
        self._publish()
        if self._store.add("ticket", 1) > 1:
            self._until(lambda: self._verdict() is not None, _ANSWER)
            return None
        before = self._beats()
        time.sleep(_SILENT * self._tick)
        now = self._beats()
        pairs = enumerate(zip(before, now, strict=True))
        return now, [
            rank
            for rank, (old, new) in pairs
            if new is None or (old is not None and old.ordinal == new.ordinal and not new.ending)
        ]

    def _judge(self, silent: list[int]) -> None:
        """Let the others end, and those that cannot be asked to; wait until they have heard it."""
        self._store.set("verdict", json.dumps(silent))
        self._kill(silent)
        others = len(self._places) - len({*silent, self._rank})
        self._until(lambda: self._store.add("heard", 0) >= others, _SILENT)

    def _until(self, condition: Callable[[], bool], ticks: int) -> None:
        for _ in range(10 * ticks):
            if condition():
                return
            time.sleep(self._tick / 10)

    def _verdict(self) -> list[int] | None:
        found: list[int] | None = None
        if self._store.check(["verdict"]):
            found = json.loads(self._store.get("verdict"))
            if not self._heard:
                self._heard = True
                self._kill(found or [])
                self._store.add("heard", 1)
        return found

    def _kill(self, silent: list[int]) -> None:
        """A stopped process hears nothing, and torchrun would wait for it; only siblings are killed."""
        for place in (self._places[rank] for rank in silent if rank != self._rank):
            if place.is_sibling():
                os.kill(place.pid, signal.SIGKILL)

    def _ask(self, question: Callable[[], Value]) -> Value:
        """The store's answer.

        Raises:
            Fault: there is none.
        """
        answers: list[Value] = []

        def ask() -> None:
            try:
                answers.append(question())
            except RuntimeError:
                return

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(2 * _ANSWER * self._tick)
        if answers:
            return answers[0]
        if self._kept_by_launcher:
            how = "the launcher, which keeps the job's store, was killed or hangs"
        else:
            how = (
                f"{names([0], self._places)}, which keeps the job's store, {fate(self._places[0])}"
            )
            self._kill([0])
        raise Fault(
            f"{how}, seen from rank {self._rank} in {self._here}; look at that host, then carry on with "
            "resume=true"
        )

    # ---- what an exception means

    @property
    def _here(self) -> str:
        return beat(0, self._position, self._ending).where

    def _account_for(self, error: Exception) -> Exception:
        """The exception to leave with: the own one with its place, a Fault, or ToldElsewhere."""
        own = f"{names([self._rank], self._places)}, in {self._here}"
        if len(self._places) == 1:
            error.add_note(f"on {own}")
            return error
        if threading.current_thread() is threading.main_thread():
            # Launchers terminate the others of a process that has ended: not before the last word.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self._heard:  # whoever spoke has ended, and that is what failed here
            return ToldElsewhere()
        broken = _is_communication(error)
        try:
            looked = self._ask(self._look_if_first)
        except Fault as fault:
            error.add_note(f"on {own}")
            return fault if broken else error
        if looked is None:
            return ToldElsewhere()
        beats, silent = looked
        if broken:
            told: Exception = Fault(blame(beats, silent, self._places, self._timeout_s))
        elif isinstance(error, InputError):
            told = Fault(f"{error}{self._guilty(beats)}")
        else:
            error.add_note(f"on {own}")
            told = error
        self._ask(lambda: self._judge(silent))
        return told

    def _guilty(self, beats: list[Beat | None]) -> str:
        """The ranks whose fault an InputError is, in brackets; nothing where it is everyone's."""
        found = [rank for rank, one in enumerate(beats) if one is not None and one.found]
        ending = [rank for rank, one in enumerate(beats) if one is not None and one.ending]
        guilty = found or ending
        first = beats[guilty[0]] if guilty else None
        if first is None or (not found and len(guilty) == len(beats)):
            return ""
        what = f"{first.found} on " if found else ""
        return f" ({what}{names(guilty, self._places)}, in {first.where})"


def _is_communication(error: BaseException | None) -> bool:
    """Whether a collective failed because of another process; gloo has no type of its own for that."""
    while error is not None:
        if isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))
        ):
            return True
        error = error.__cause__
    return False
