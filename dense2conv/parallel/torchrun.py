"""``python -m dense2conv.parallel.torchrun``: torchrun, with a sentence where machines do not meet."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousTimeoutError,
)


def main(words: Sequence[str]) -> int:
    """Run torchrun with these words; returns its exit code where it has one."""
    try:
        run.main(list(words))
    except RendezvousError as error:
        print(f"dense2conv: {_sentence(error, words)}", file=sys.stderr)
        return 1
    return 0


def _sentence(error: RendezvousError, words: Sequence[str]) -> str:
    asked = run.parse_args(list(words))
    where = f"{asked.rdzv_endpoint}, where {asked.nnodes} machines are to meet"
    if isinstance(error, RendezvousTimeoutError):
        how = f"waits at {where}, and not all came in time ({asked.rdzv_conf})"
    elif isinstance(error, RendezvousConnectionError):
        how = f"finds nobody at {where}"
    else:
        how = f"cannot join at {where}: {str(error) or type(error).__name__}"
    return (
        f"{socket.gethostname()} {how}; start the same line on each of them, with the address of one and a "
        "port that is open there, or correct the number of machines (--nodes)"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
