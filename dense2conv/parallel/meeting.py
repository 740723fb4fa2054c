"""Where the ranks of a job meet: a store that their launcher keeps, or rank 0, and who comes to it."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from dense2conv.parallel.faults import Fault, ToldElsewhere

_BETWEEN_TRIES_S = 0.2


def meet(timeout_s: float) -> dist.Store:
    """The job's store, once all its ranks have come to it.

    Raises:
        Fault: nobody answers at the job's address, or not all ranks come in ``timeout_s``.
        ToldElsewhere: rank 0 says which ones are missing.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deadline = time.monotonic() + timeout_s
    by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeps = rank == 0 and not by_launcher
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise Fault(
            f"{_me()} does not know where the ranks meet ({error}): set MASTER_ADDR to the host of rank 0 "
            "and MASTER_PORT to a free port there, as torchrun does"
        ) from error
    if not keeps:
        _wait_for_answer(host, port, deadline, timeout_s)
    try:
        store = dist.TCPStore(
            *(host, port),
            is_master=keeps,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise Fault(
            f"{_me()} cannot keep a store at port {port} ({_first_line(error)}): another run has it; set "
            "MASTER_PORT to a free one"
        ) from error
    if not by_launcher:  # which has started them all
        _wait_for_ranks(store, rank, size, f"{host}:{port}", deadline, timeout_s)
    return store


def _wait_for_answer(host: str, port: int, deadline: float, timeout_s: float) -> None:
    """Try until somebody listens there; TCPStore would as well, with pages of warnings."""
    while True:
        try:
            socket.create_connection((host, port), timeout=timeout_s).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise Fault(
                    f"{_me()} waited {timeout_s:g} s for rank 0 at MASTER_ADDR:MASTER_PORT={host}:{port}, "
                    f"where nobody answers ({error.strerror or error}); start rank 0 on that host, or "
                    "correct the address or the list of nodes"
                ) from error
        time.sleep(_BETWEEN_TRIES_S)


def _wait_for_ranks(
    store: dist.Store, rank: int, size: int, address: str, deadline: float, timeout_s: float
) -> None:
    here, again = "ranks here", f"waits at {address}"
    if store.add(f"rank {rank}", 1) > 1:
        raise Fault(
            f"{_me()} is the second rank {rank} at {address}: two tasks have one number, or two runs one "
            "address; give each task its own RANK, or another MASTER_PORT"
        )
    store.set(f"host of {rank}", socket.gethostname())
    store.add(here, 1)
    while True:
        try:
            if (number := store.add(here, 0)) == size:
                return
            if time.monotonic() < deadline:
                time.sleep(_BETWEEN_TRIES_S)
                continue
            missing = [other for other in range(size) if not store.check([f"rank {other}"])]
        except RuntimeError as error:  # rank 0 keeps the store, and waits no longer
            raise ToldElsewhere from error
        if rank != 0:
            time.sleep(_BETWEEN_TRIES_S)
            raise ToldElsewhere
        hosts = sorted(
            {store.get(f"host of {r}").decode() for r in range(size) if r not in missing}
        )
        named = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        raise Fault(
            f"{_me()} {again}, and in {timeout_s:g} s {number} of {size} ranks came, from "
            f"{', '.join(hosts)}; missing: {named}. Start those, or as many as there are nodes for: the "
            "product of parallel.pp, parallel.dp and parallel.tp"
        )


def _me() -> str:
    return f"rank {os.environ['RANK']} on {socket.gethostname()}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
