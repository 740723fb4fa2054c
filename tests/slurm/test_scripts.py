"""What the launchers say and run, as far as that needs no cluster."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dense2conv.cli import main
from dense2conv.training.checkpoint import latest
from tests.ranks import on_ranks
from tests.slurm.cluster import free_ports, nameless, wait_until
from tests.training.test_checkpoint import assert_equal

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = [
    *(path for path in ROOT.glob("launch/*") if path.name != "setup"),
    *ROOT.glob("slurm/*"),
]
SMALL = [
    "data.side=6",
    "model.widths=[36,17]",
    "train.batch=64",
    "train.dtype=float64",
    "train.steps=200",
    "checkpoint.every=10",
    "log.every=5",
    "wandb.mode=disabled",
    "parallel.device=cpu",
]


def script(name: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher with nothing of this machine in its environment."""
    environment = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(
        [str(ROOT / name), *words], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def planned(tmp_path):
    """An environment of a launcher whose ``python`` prints the words it was given."""
    (tmp_path / ".dense2conv").touch()  # nothing is to be installed
    (tmp_path / "python").write_text('#!/bin/sh\necho python "$@"\n')
    (tmp_path / "python").chmod(0o755)
    return {"VIRTUAL_ENV": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    words = ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *SCRIPTS]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--nproc 8 a=1", "--nnodes=1 --nproc-per-node=8 --standalone --max-restarts=0"),
        ("--nproc=2 a=1", "--nproc-per-node=2"),
        (
            "--nproc 8 --nodes 2 --rendezvous node1:29500 --id one a=1",
            "--nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=node1:29500 --rdzv-id=one "
            "--rdzv-conf=join_timeout=300,read_timeout=300",
        ),
        ("--nodes 2 --rendezvous a:1 parallel.timeout_s=20", "join_timeout=20,read_timeout=20"),
        ("--nproc 1 --max-restarts 3 a=1", "--max-restarts=3"),
        ("--nproc 1 --max-restarts 3 a=1", "-m dense2conv train a=1 run.existing=resume"),
        ("--nproc 1 a=1 b=[2,3]", "-m dense2conv train a=1 b=[2,3]"),
        ("--nproc 1", "-m dense2conv train"),
    ],
)
def test_a_dry_run_prints_the_torchrun_command(planned, words, expected):
    done = script("launch/train", "--dry-run", *words.split(), **planned)
    assert done.returncode == 0
    assert expected in " ".join(shlex.split(done.stdout.splitlines()[0])), done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--nproc 2 a=1", "nodes=1 cluster=laptop cluster.devices=2 a=1"),
        (
            "--nproc 8 --nodes 2 --rendezvous node1:29500 --cluster h200x8 a=1 b=[2,3]",
            "nodes=2 cluster=h200x8 cluster.devices=8 a=1 b=[2,3]",
        ),
        (
            "--nproc 1 --max-restarts 1",
            "nodes=1 cluster=laptop cluster.devices=1 run.existing=resume",
        ),
    ],
)
def test_a_dry_run_plans_what_would_be_launched(planned, words, expected):
    done = script("launch/train", "--dry-run", *words.split(), **planned)
    assert (
        done.stdout.splitlines()[-1]
        == f"python -m dense2conv plan mesh=given rehearse=true {expected}"
    )


def test_a_dry_run_says_what_a_process_needs_or_why_the_mesh_cannot_be(planned):
    planned |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    planned |= {"PYTHONPATH": str(ROOT)}
    words = ["--dry-run", "--nproc", "2", "experiment=demo"]
    done = script("launch/train", *words, "parallel.tp=2", **planned)
    assert done.returncode == 0, done.stderr
    assert "mesh pp1×dp1×tp2" in done.stdout
    assert "memory of a device" in done.stdout
    assert "a step" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert re.search(r"stage 1 +\d+ collectives, the same as planned; tensors take .* GB", last)
    done = script("launch/train", *words, "parallel.tp=4", **planned)
    assert done.returncode == 2
    assert "pp1×dp1×tp4 needs 4 processes" in done.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--nproc", "--nproc needs a value"),
        ("--nproc 0 a=1", "--nproc=0; use 1 or more"),
        ("--nodes 1:4 a=1", "--nodes=1:4; use 1 or more"),
        ("--max-restarts -1 a=1", "--max-restarts=-1; use 0 or more"),
        ("--nodes 2 a=1", "--nodes 2 needs --rendezvous HOST:PORT"),
        ("--rendezvous= a=1", "--rendezvous needs a value"),
        ("--nprocs 2 a=1", "option --nprocs is unknown"),
        ("train a=1", "train is neither"),
        ("a=1 --nproc=2", "--nproc=2 comes after the configuration"),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(words, named):
    done = script("launch/train", *words.split())
    assert done.returncode == 2
    assert named in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_names_every_option():
    text = script("launch/train", "--help").stdout
    options = "--nproc --nodes --rendezvous --id --max-restarts --dry-run --cluster --help"
    for option in options.split():
        assert option in text


@pytest.mark.skipif(nameless() is not None, reason=nameless() or "")
@pytest.mark.parametrize(
    "address", ["localhost", pytest.param("nowhere.invalid", marks=pytest.mark.slow)]
)
def test_machines_that_do_not_meet_are_told_so(address, planned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = f"{address}:{free_ports(1)[0]}"
    words = f"--dry-run --nproc 1 --nodes 2 --rendezvous {place} parallel.timeout_s=2"
    command = shlex.split(script("launch/train", *words.split(), **planned).stdout.splitlines()[0])
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert time.monotonic() - began < 40  # on a machine that is busy
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"dense2conv: {socket.gethostname()} ")
    assert f"{place}, where 2 machines are to meet" in last
    assert "not all came in time" in last if address == "localhost" else "nobody" in last
    assert "start the same line on each" in last


@pytest.fixture
def sbatch(tmp_path):
    """A folder with an ``sbatch`` that prints the words it was given."""
    (tmp_path / "sbatch").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "sbatch").chmod(0o755)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("name", "variables", "expected"),
    [
        ("train", {}, ["--nodes=1", "--ntasks-per-node=1"]),
        (
            "train",
            {"NODES": "2", "GPUS": "8", "PARTITION": "gpu", "TIME": "1:0:0", "CPUS": "6"},
            [
                "--nodes=2",
                "--ntasks-per-node=8",
                "--gpus-per-node=8",
                "--cpus-per-task=6",
                "--partition=gpu",
                "--time=1:0:0",
            ],
        ),
        (
            "torchrun",
            {"GPUS": "8", "CPUS": "6", "QOS": "q", "ACCOUNT": "a"},
            [
                "--nodes=1",
                "--ntasks-per-node=1",
                "--gpus-per-node=8",
                "--cpus-per-task=48",
                "--account=a",
                "--qos=q",
            ],
        ),
    ],
)
def test_submit_turns_variables_into_words_of_sbatch(sbatch, name, variables, expected):
    variables = {"PATH": f"{sbatch}:{os.environ['PATH']}", **variables}
    done = script("slurm/submit", name, "--array=1-2", "a=1", **variables)
    words = done.stdout.split()
    assert sorted(words[:-2]) == sorted([*expected, "--array=1-2"])
    assert words[-2:] == [str(ROOT / f"slurm/{name}.sbatch"), "a=1"]


def test_submit_without_a_file_explains_itself():
    done = script("slurm/submit", "nothing")
    assert done.returncode == 2
    assert "NODES=2 GPUS=8" in done.stderr


def last_step(run: str) -> dict[str, float]:
    metrics = Path("runs", run, "metrics.jsonl")
    whole = metrics.read_text().rpartition("\n")[0] if metrics.exists() else ""
    return json.loads(whole.splitlines()[-1]) if whole else {"step": 0}


@pytest.mark.skipif(nameless() is not None, reason=nameless() or "")
def test_two_nodes_start_again_when_a_process_is_killed(tmp_path, planned, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (
        f"--dry-run --nproc 1 --nodes 2 --rendezvous localhost:{free_ports(1)[0]} --max-restarts 3"
    )
    line = script("launch/train", *words.split(), *SMALL, "parallel.tp=2", **planned).stdout
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    command = shlex.split(line.splitlines()[0])
    with (tmp_path / "log").open("w") as log:
        nodes = [subprocess.Popen(command, stdout=log, stderr=log) for _ in range(2)]
    try:
        folder = Path("runs", "run", "checkpoints")
        wait_until(lambda: latest(folder) is not None, "the run has saved")
        pid = nodes[0].pid
        (rank,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(rank), signal.SIGKILL)
        wait_until(lambda: all(node.poll() is not None for node in nodes), "both nodes have ended")
    finally:
        for node in nodes:
            node.terminate()
            node.wait()
    assert [node.returncode for node in nodes] == [0, 0], (tmp_path / "log").read_text()
    assert_undisturbed(tmp_path)


def assert_undisturbed(folder: Path) -> None:
    """The run in ``folder`` has ended with the bits that two undisturbed processes end with."""
    words = [*SMALL, "parallel.tp=2", f"run.root={folder / 'runs'}", "run.name=undisturbed"]
    assert on_ranks(2, main, ["train", *words]) == [0, 0]
    assert last_step("run")["step"] == 200
    assert_equal(
        *(latest(folder / "runs" / name / "checkpoints") for name in ("run", "undisturbed"))
    )


@pytest.mark.slow
def test_launched_processes_start_again_when_one_is_killed(tmp_path, planned, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--nproc", "2", "--max-restarts", "1", *SMALL, "parallel.tp=2"]
    with (tmp_path / "log").open("w") as log:
        environment = {**os.environ, "VIRTUAL_ENV": planned["VIRTUAL_ENV"]}
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        run = subprocess.Popen([ROOT / "launch/train", *words], stderr=log, env=environment)
    try:
        wait_until(lambda: latest(Path("runs/run/checkpoints")) is not None, "the run has saved")
        pid = run.pid
        ranks = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(ranks[1]), signal.SIGKILL)
        wait_until(lambda: run.poll() is not None, "it has ended")
    finally:
        run.terminate()
        run.wait()
    assert run.returncode == 0, (tmp_path / "log").read_text()
    assert "was killed, last seen in " in (tmp_path / "log").read_text()
    assert_undisturbed(tmp_path)
