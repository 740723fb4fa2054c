"""Run a function on W gloo ranks: fresh processes from a fork server that has torch imported already."""

from __future__ import annotations

import contextlib
import io
import multiprocessing as mp
import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.distributed.checkpoint", "dense2conv.training.loop"]
)
_TIMEOUT_S = 120


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(*arguments)`` on ``world_size`` processes that find each other as torchrun's
    would.

    The function opens its own mesh or process group. Returns every rank's result, by rank; the
    first failure is raised here with that rank's traceback.
    """
    results: Any = _CONTEXT.Queue()
    store = meeting_place()
    processes = [
        _CONTEXT.Process(
            target=_run, args=(rank, world_size, store.port, results, function, arguments)
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=_TIMEOUT_S) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
    for rank, (ok, value) in sorted(found.items()):
        if not ok:
            raise AssertionError(f"rank {rank} of {world_size} failed:\n{value}")
    return [pickle.loads(found[rank][1]) for rank in range(world_size)]


def meeting_place() -> dist.TCPStore:
    """A store that this process keeps, as a launcher does: nobody has to guess a free port."""
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5)
    )


def _run(
    rank: int,
    world_size: int,
    port: int,
    results: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            value = function(*arguments)
        # Pickled here, by value: torch would send handles that die with this process.
        results.put((rank, (True, pickle.dumps(value))))
    except BaseException:
        results.put((rank, (False, traceback.format_exc())))
