"""A list of nodes that lies: whoever waits for a rank that never comes says where, and for whom."""

import os
import pickle
import re
import socket
import time

import pytest

from dense2conv.cli import main
from dense2conv.parallel.faults import Fault, ToldElsewhere
from dense2conv.parallel.meeting import meet
from tests.ranks import _CONTEXT, _run
from tests.slurm.cluster import free_ports

HOST = socket.gethostname()


def _met(number: int, timeout_s: float) -> str:
    """As rank ``number``, what comes of meeting the others."""
    os.environ |= {"RANK": str(number), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    began = time.monotonic()
    try:
        store = meet(timeout_s)
    except (Fault, ToldElsewhere) as end:
        assert time.monotonic() - began < timeout_s + 8
        return f"{type(end).__name__}: {end}"
    left, size = store.add("left", 1), int(os.environ["WORLD_SIZE"])
    while number == 0 and left < size:  # it keeps the store for the others
        time.sleep(0.05)
        left = store.add("left", 0)
    return "met"


def together(numbers: list[int], size: int, timeout_s: float = 2) -> list[str]:
    """What the ranks that come say, sorted."""
    port, results = free_ports(1)[0], _CONTEXT.Queue()
    processes = [
        _CONTEXT.Process(target=_run, args=(place, size, port, results, _met, (number, timeout_s)))
        for place, number in enumerate(numbers)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(ok for _, (ok, _) in found), found
    return sorted(pickle.loads(value) for _, (_, value) in found)


def test_all_that_come_meet():
    assert together([0, 1, 2], 3, timeout_s=60) == ["met"] * 3


def test_ranks_that_never_come_are_named_once_with_those_that_did():
    named, *others = together([0, 2], 4)
    assert others == ["ToldElsewhere: "]
    assert re.fullmatch(
        rf"Fault: rank 0 on {HOST} waits at 127.0.0.1:\d+, and in 2 s 2 of 4 ranks came, from {HOST}; "
        r"missing: 1, 3\. Start those, or .*parallel.pp, parallel.dp and parallel.tp",
        named,
    )


def test_two_tasks_with_one_number_are_named():
    found = together([0, 1, 1], 3)
    assert any(f"rank 1 on {HOST} is the second rank 1 at 127.0.0.1:" in text for text in found)


@pytest.mark.parametrize(
    ("address", "named"),
    [("127.0.0.1", "Connection refused"), ("nowhere.invalid", "Name or service not known")],
)
def test_an_address_where_nobody_answers_is_named(address, named, monkeypatch, capsys):
    port = free_ports(1)[0]
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }.items():
        monkeypatch.setenv(name, value)
    words = ["parallel.tp=2", "parallel.device=cpu", "parallel.timeout_s=1"]
    assert main(["train", *words]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"dense2conv: rank 1 on {HOST} waited 1 s for rank 0 at " in line
    assert f"{address}:{port}, where nobody answers ({named})" in line
    assert "correct the address or the list of nodes" in line


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_an_address_that_was_not_given_is_named(missing, monkeypatch):
    for name in {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - {missing}:
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv(missing, raising=False)
    with pytest.raises(Fault, match=f"does not know where the ranks meet .*{missing}"):
        meet(1)


def test_slurm_tasks_that_are_no_mesh_are_told_srun(monkeypatch, capsys):
    slurm = {"JOB_ID": "7", "STEP_ID": "0", "NTASKS": "3", "PROCID": "0", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    assert main(["train", "parallel.tp=2", "parallel.device=cpu"]) == 2
    assert "but 3 were started; change the mesh, or start 2 (srun --ntasks=2)" in (
        capsys.readouterr().err
    )
