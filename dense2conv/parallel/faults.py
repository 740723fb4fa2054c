"""How a run ends that one process has spoilt: who says so, and who keeps quiet."""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler


class Fault(Exception):
    """What ended the run, in a sentence that names rank, host, phase and remedy."""


class ToldElsewhere(Exception):
    """The run ended, and another process says why."""


class Agreed(Exception):
    """An end that all processes have agreed on: nobody is to blame."""


def say(fault: Fault) -> None:
    """The last line of this process, which torchrun repeats in its own account of what failed."""
    bar = "\n" if sys.stderr.isatty() else ""  # a progress bar's line has not ended
    print(f"{bar}dense2conv: {fault}", file=sys.stderr, flush=True)
    try:
        raise Fault(str(fault))  # what is told is the traceback
    except Fault as told:
        ErrorHandler().record_exception(told)
