"""Who starts the processes: torchrun or Slurm where they are there, otherwise we do, on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

_LAUNCHER = "DENSE2CONV_LAUNCHER_PID"
_GRACE_S = 4.0  # between asking the other processes to end and making them


def adopt_slurm() -> None:
    """Inside ``srun`` with one task per process, name the ranks as torch expects them."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) < 2:
        return
    if "SLURM_PROCID" not in os.environ or "SLURM_STEP_ID" not in os.environ:
        return
    port = 20000 + int(os.environ["SLURM_JOB_ID"]) % 20000
    for name, value in {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_NTASKS"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "MASTER_ADDR": os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"),
        "MASTER_PORT": str(port),
    }.items():
        os.environ.setdefault(name, value)


def inside_job() -> bool:
    """Whether somebody has started the ranks already."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def end_with_launcher() -> None:
    """In a rank that we started: end when the process that started it is gone, even if killed."""
    launcher = os.environ.get(_LAUNCHER)
    if launcher is None:
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_local_ranks(num_ranks: int, arguments: list[str]) -> int:
    """Run ``python -m dense2conv ARGUMENTS`` on local ranks; the first failure ends them all.

    Returns:
        The exit code: 0, or that of the first process that failed.
    """
    # This process keeps the store, so no port has to be guessed.
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5)
    )
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        _LAUNCHER: str(os.getpid()),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "dense2conv", *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(num_ranks)
    ]

    def forward(number: int, _frame: object) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    # Ctrl-C reaches the ranks by itself; the others are passed on, and all are waited for.
    previous = {
        number: signal.signal(number, forward if number != signal.SIGINT else signal.SIG_IGN)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        return _wait(ranks)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in ranks]
        failed = [code for code in codes if code]
        if failed:
            _end(ranks)
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Let the others notice, stopped ones as well, then terminate them, then kill them."""
    for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _GRACE_S
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)
        while time.monotonic() < deadline and any(p.poll() is None for p in ranks):
            time.sleep(0.05)
