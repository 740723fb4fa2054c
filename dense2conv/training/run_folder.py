"""The one folder in which a run lives."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dense2conv.files import write_atomically
from dense2conv.shapes import InputError


@dataclass
class RunConfig:
    """Where a run lives."""

    name: str = field(default="run", metadata={"help": "the run's name: its folder is ROOT/NAME"})
    root: str = field(default="runs", metadata={"help": "folder of all runs"})
    existing: str = field(
        default="fail",
        metadata={
            "help": "if the folder is there: fail | keep_aside (as NAME.1, …) | resume its run"
        },
    )

    @property
    def folder(self) -> Path:
        return Path(self.root) / self.name

    def validate(self) -> None:
        """Raise InputError for a name that is no folder name."""
        if not re.fullmatch(r"[\w][\w.+=,@-]*", self.name):
            raise InputError(
                f"run.name={self.name!r} is no folder name; use letters, digits, '.', '_', '-'"
            )
        if self.existing not in ("fail", "keep_aside", "resume"):
            raise InputError(
                f"run.existing={self.existing!r} is unknown; use fail, keep_aside or resume"
            )


class RunFolder:
    """Paths inside a run's folder, and the small files that rank 0 writes there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: TextIO | None = None
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.fields = path / "fields"
        self.trace = path / "trace.json"
        self.extracted = path / "extracted"

    def check(self, config: RunConfig, resume: bool) -> None:
        """Raise InputError if a new run would overwrite an old one, or there is none to resume."""
        if resume:
            if not self.config.is_file():
                raise InputError(
                    f"resume=true, but {self.path} holds no run; give the run.name of one, "
                    "or drop resume=true"
                )
        elif self.path.exists() and config.existing == "fail":
            raise InputError(
                f"{self.path} exists already; carry on with resume=true, choose another run.name, or "
                "keep the older one aside with run.existing=keep_aside"
            )

    def hold(self) -> None:
        """Keep every other process out of the folder, until ``release`` or the end of this one.

        Raises:
            InputError: another process has it.
        """
        lock = open(self.path / ".lock", "a+")  # noqa: SIM115, it is kept open
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise InputError(
                f"{self.path} is in use by {holder}; wait for it or end it, or choose another run.name"
            ) from error
        except OSError as error:  # some network file systems know no locks
            logging.getLogger(__name__).warning("%s cannot be locked: %s", self.path, error)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        self.release()
        self._lock = lock

    def release(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def create(self, config: RunConfig, resume: bool) -> None:
        """Make the folder and hold it, moving an older one aside where that was asked for."""
        self.check(config, resume)
        if self.path.exists():
            self.hold()
        if self.path.exists() and not resume:
            number = 1
            while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
                number += 1
            self.path.rename(aside)
        self.fields.mkdir(parents=True, exist_ok=True)
        if not resume:
            self.hold()

    def require(self, what: str, path: Path, command: str) -> None:
        """Raise InputError if an earlier phase's result is missing."""
        if not path.exists():
            raise InputError(
                f"{self.path} holds no {what}; make it first: dense2conv {command} "
                f"run.name={self.path.name}"
            )

    def update_summary(self, values: dict[str, Any]) -> dict[str, Any]:
        """Merge ``values`` into summary.json, atomically, and give the whole back."""
        summary = json.loads(self.summary.read_text()) if self.summary.exists() else {}
        summary |= values
        write_atomically(self.summary, json.dumps(summary, indent=2) + "\n")
        return summary
