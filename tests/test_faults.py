"""One process of a run goes wrong: all end in time, and one sentence says which, where, and what to do."""

import itertools
import os
import re
import signal
import socket
import time
import traceback
from pathlib import Path

import pytest
import torch

from dense2conv.cli import main
from dense2conv.training import loop
from tests.ranks import _CONTEXT, meeting_place
from tests.slurm.cluster import free_ports

HOST = socket.gethostname()
TIMEOUT_S = 5
MOST_S = 20  # on a machine that is busy
WORDS = [
    "data.side=6",
    "model.widths=[36,17]",
    "train.batch=64",
    "train.steps=1000000",
    "log.every=5",
    "wandb.mode=disabled",
    "parallel.device=cpu",
    f"parallel.timeout_s={TIMEOUT_S}",
]


def _rank(rank, environment, folder, fault, words):
    """One process of a job; on the rank that goes wrong, ``fault`` is given a batch to spoil."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **environment}
    with open(folder / f"stderr.{rank}", "w") as file:
        os.dup2(file.fileno(), 2)
    next_batch, build_stack = loop.next_batch, loop.build_stack
    stacks, starts = [], []

    def built(*arguments):
        stacks.append(build_stack(*arguments))
        return stacks[0]

    def faulty(*arguments):
        x = next_batch(*arguments)
        starts.append(time.monotonic())
        # By then the others have heard of a step.
        if fault is not None and starts[-1] > starts[0] + TIMEOUT_S / 4:
            (folder / "fault").touch()
            fault(x, stacks[0])
        return x

    loop.next_batch, loop.build_stack = faulty, built
    code = 1
    try:
        code = main(["train", *words])
    except Exception:
        traceback.print_exc()
    os._exit(code)


class Job:
    """Processes of a run, of which the last has a fault, or the first, which then keeps the store."""

    def __init__(self, folder: Path, size: int, fault, *words: str, guilty: int = -1):
        self.folder = folder
        self.store = meeting_place() if guilty else None
        environment = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        environment["MASTER_PORT"] = str(self.store.port if self.store else free_ports(1)[0])
        environment["TORCHELASTIC_USE_AGENT_STORE"] = str(self.store is not None)
        words = (*WORDS, f"run.root={folder / 'runs'}", *words)
        self.ranks = [
            _CONTEXT.Process(
                target=_rank,
                args=(rank, environment, folder, fault if rank == guilty % size else None, words),
            )
            for rank in range(size)
        ]
        for process in self.ranks:
            process.start()

    def end(self) -> list[str]:
        """What its processes say, when all have ended within time of the fault."""
        try:
            _until(lambda: (self.folder / "fault").exists(), 60)
            began = time.monotonic()
            _until(lambda: not any(process.is_alive() for process in self.ranks), MOST_S)
            print(f"all have ended {time.monotonic() - began:.1f} s later")
        finally:
            for process in self.ranks:
                process.kill()
                process.join()
        text = "".join(path.read_text() for path in sorted(self.folder.glob("stderr.*")))
        print(text)
        assert all(process.exitcode for process in self.ranks)
        return [line for line in text.splitlines() if line.startswith("dense2conv: ")]


def _until(condition, seconds: float) -> None:
    for _ in itertools.takewhile(lambda _: not condition(), range(int(20 * seconds))):
        time.sleep(0.05)
    assert condition(), f"not within {seconds} s"


def stop(x, stack):
    os.kill(os.getpid(), signal.SIGSTOP)


def hang(x, stack):
    while True:
        time.sleep(0.01)


def die(x, stack):
    os.kill(os.getpid(), signal.SIGKILL)


def spoil_images(x, stack):
    x[0, 0] = float("nan")


def spoil_weights(x, stack):
    stack.layer(0).weight.data[0, 0] = float("nan")


def lack_memory(x, stack):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a …")


def blunder(x, stack):
    raise TypeError("a blunder")


HANGS = (
    r"hangs in reading images of step \d+, for \d+ s now at training/loop.py:\d+; .*resume=true; "
    rf"if it needs that long, raise parallel.timeout_s={TIMEOUT_S}"
)
KILLED = r"was killed, last seen in [\w ]+ of step \d+; look at that host \(dmesg .*resume=true"
STOPPED = r"was stopped by a signal, last seen in [\w ]+ of step \d+; look at .*resume=true"
KEEPER = r", which keeps the job's store, was {}, seen from rank 1 in .* of step \d+; .*resume=true"
NOT_FINITE = (  # in the layer below or, where that is another stage, above: whoever finds it first
    r"features of layer[12] hold NaN .*\(NaN or Inf in {} on {}, in forward and backward of step"
)
LACKS_MEMORY = (
    r"out of memory \(CUDA out of memory\. Tried .*\); the largest tensors here are .* MiB; "
    r"narrow model.widths, or .*parallel\.\w+ .*\(no memory left on {}, in reading images of step \d+\)"
)
CASES = {
    "stopped": (2, stop, "parallel.tp=2", -1, STOPPED),
    "hung alone": (1, hang, "parallel.tp=1", -1, HANGS),
    "killed": (2, die, "parallel.tp=2", -1, KILLED),
    "NaN in images": (2, spoil_images, "parallel.dp=2", -1, NOT_FINITE.format("the images", "{}")),
}
SLOW = {
    "stopped, in a pipeline": (2, stop, "parallel.pp=2", 0, KEEPER.format("stopped by a signal")),
    "stopped, first": (2, stop, "parallel.dp=2", 0, KEEPER.format("stopped by a signal")),
    "killed, first": (2, die, "parallel.tp=2", 0, KEEPER.format("killed")),
    "killed, of four": (4, die, "parallel.tp=2 parallel.dp=2", -1, KILLED),
    "no memory": (2, lack_memory, "parallel.tp=2", -1, LACKS_MEMORY),
    "hung, first": (2, hang, "parallel.tp=2", 0, HANGS),
    "hung": (2, hang, "parallel.dp=2", -1, HANGS),
    "hung, in a pipeline": (2, hang, "parallel.pp=2", 0, HANGS),
    "NaN in weights": (
        *(2, spoil_weights, "parallel.tp=2", -1),
        NOT_FINITE.format("layers.layer1.weight", "{}"),
    ),
    "NaN before a pipeline": (
        *(4, spoil_images, "parallel.dp=2 parallel.pp=2", 1),
        NOT_FINITE.format("the images", "{}"),
    ),
}


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_all_end_in_time_and_one_sentence_says_why(name, tmp_path):
    size, fault, mesh, guilty, expected = (CASES | SLOW)[name]
    job = Job(tmp_path, size, fault, *mesh.split(), guilty=guilty)
    rank = guilty % size
    (line,) = job.end()
    who = f"rank {rank} on {HOST} (process {job.ranks[rank].pid})"
    assert who in line
    assert re.search(expected.replace("{}", re.escape(who)), line)
