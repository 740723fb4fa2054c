"""A signal stops all processes after the same step, and the resumed run is the undisturbed one."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dense2conv.data import open_source
from dense2conv.parallel import ParallelConfig, open_mesh
from dense2conv.training import checkpoint, loop
from dense2conv.training.config import Config
from dense2conv.training.run_folder import RunFolder
from dense2conv.training.signals import EX_REQUEUE, Stopped, StopRequest
from tests.ranks import on_ranks

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
MESHES = [(1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 1, 2), (2, 1, 2)]  # pp, dp, tp


def parallel(mesh: tuple[int, int, int]) -> ParallelConfig:
    pp, dp, tp = mesh
    return ParallelConfig(pp=pp, dp=dp, tp=tp, device="cpu", timeout_s=60)


def _stops(mesh_sizes, cases):
    """For each case, (rank, step, signal): after which step this process stops, and why."""
    found = []
    with open_mesh(parallel(mesh_sizes)) as mesh:
        for rank, at, number in cases:
            with suppress(Stopped), StopRequest(mesh) as stop:
                for step in range(20):
                    if dist.get_rank() == rank and step == at:
                        signal.raise_signal(number)
                    if stop.requested():
                        raise Stopped
            found.append((step, stop.reason))
    return found


@pytest.mark.parametrize("mesh", MESHES)
def test_all_processes_stop_after_the_same_step_whoever_is_asked(mesh):
    size = mesh[0] * mesh[1] * mesh[2]
    delay = 1 if mesh[0] == 1 else 4
    cases = [(rank, 3 * rank, number) for rank in range(size) for number in SIGNALS]
    expected = [(at + delay, number.name) for _, at, number in cases]
    assert on_ranks(size, _stops, mesh, [*cases, (-1, 0, 0)]) == [[*expected, (19, "")]] * size


def _runs_ahead():
    with open_mesh(parallel((2, 1, 1))) as mesh, StopRequest(mesh) as stop:
        word = torch.zeros(1)
        if mesh.pp.rank == 0:
            for _ in range(4):
                stop.requested()
            dist.send(word, 1)  # the second stage has not begun
        else:
            dist.recv(word, 0)
            for _ in range(4):
                stop.requested()


def test_the_first_stage_does_not_wait_for_the_second():
    on_ranks(2, _runs_ahead)


def _disturbed(mesh_sizes, root, requests):
    """Train with a signal at each (rank, step) of ``requests``; where it stopped, and why."""
    config = Config()
    config.data.side, config.model.widths = 6, [36, 17]
    config.train.batch, config.train.steps, config.train.dtype = 64, 24, "float64"
    config.checkpoint.every, config.resume = 10, True
    config.parallel = parallel(mesh_sizes)
    learning_rate = loop.learning_rate
    stops = []
    with open_mesh(config.parallel) as mesh:
        folder = RunFolder(Path(root))
        folder.fields.mkdir(parents=True, exist_ok=True)
        source = open_source(config.data, config.seed)
        for rank, at in [*requests, (-1, 0)]:

            def asked(optimizer, step, steps, rank=rank, at=at):
                if (dist.get_rank(), step) == (rank, at):
                    signal.raise_signal(signal.SIGTERM)
                return learning_rate(optimizer, step, steps)

            loop.learning_rate = asked
            try:
                loop.train(config, mesh, folder, source, [])
            except Stopped as stopped:
                stops.append(str(stopped))
    return stops


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 1, 2), (2, 1, 1)])
def test_a_run_that_is_stopped_twice_ends_with_the_weights_of_an_undisturbed_one(mesh, tmp_path):
    size = mesh[0] * mesh[1] * mesh[2]
    delay = 1 if mesh[0] == 1 else 4
    on_ranks(size, _disturbed, mesh, str(tmp_path / "whole"), [])
    asked = [(size - 1, 4), (0, 15)]
    stops = on_ranks(size, _disturbed, mesh, str(tmp_path / "stopped"), asked)
    text = "stopped by SIGTERM after step {} of 24, which is saved"
    assert stops == [[text.format(at + delay + 1) for _, at in asked]] * size
    whole, stopped = (tmp_path / name / "checkpoints" for name in ("whole", "stopped"))
    assert checkpoint.latest(stopped).name == "step_00000024"
    for shard in (whole / "step_00000024").glob("*.safetensors"):
        tensors = load_file(stopped / "step_00000024" / shard.name)
        for name, value in load_file(shard).items():
            assert torch.equal(tensors[name], value), name
    steps = (tmp_path / "stopped" / "metrics.jsonl").read_text().count('"step"')
    assert steps == 24


@pytest.fixture
def heard():
    """The signals that reach the handler outside the block, in order."""
    found: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, _: found.append(number))
    yield found
    signal.signal(signal.SIGUSR1, previous)


def test_a_signal_after_the_last_step_has_its_effect_outside(heard):
    with open_mesh(ParallelConfig(device="cpu")) as mesh:
        with StopRequest(mesh) as stop:
            assert not stop.requested()
            signal.raise_signal(signal.SIGUSR1)
            assert not heard
        assert heard == [signal.SIGUSR1]
        for steps in (1, 2):  # on its way when the block ends; agreed, but not heeded
            with StopRequest(mesh) as stop:
                signal.raise_signal(signal.SIGUSR1)
                for _ in range(steps):
                    asked = stop.requested()
            assert asked == (steps == 2)
            assert len(heard) == 1 + steps
        with suppress(Stopped), StopRequest(mesh):
            signal.raise_signal(signal.SIGUSR1)
            raise Stopped
        assert len(heard) == 3
        signal.raise_signal(signal.SIGUSR1)
        assert len(heard) == 4


def test_a_second_ctrl_c_interrupts_at_once():
    presses = []
    # What a shell's background job inherits is that Ctrl-C is ignored.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    with (
        open_mesh(ParallelConfig(device="cpu")) as mesh,
        suppress(KeyboardInterrupt),
        StopRequest(mesh),
    ):
        for press in range(3):
            presses.append(press)
            signal.raise_signal(signal.SIGINT)
    assert presses == [0, 1]
    assert signal.signal(signal.SIGINT, inherited) is signal.default_int_handler


def begin(folder: Path, words: list[str]) -> subprocess.Popen[str]:
    """A run in ``folder`` that has written its first metrics."""
    run = subprocess.Popen(
        [sys.executable, "-m", "dense2conv", "train", *words],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
    )
    metrics, deadline = folder / "runs/run/metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_saves_says_so_and_ends_with_its_own_code(number, tmp_path):
    words = [
        "data.side=6",
        "model.widths=[36,17]",
        "train.batch=64",
        "train.steps=1000000",
        "checkpoint.every=1000000",
        "log.every=5",
        "wandb.mode=disabled",
        "parallel.device=cpu",
        f"parallel.tp={2 if number == signal.SIGTERM else 1}",
    ]
    run = begin(tmp_path, words)
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == EX_REQUEUE
    saved = checkpoint.latest(tmp_path / "runs/run/checkpoints")
    step = json.loads((saved / "state.json").read_text())["step"]
    assert errors.strip().splitlines()[-1] == (
        f"dense2conv: stopped by {number.name} after step {step} of 1000000, which is saved; "
        "carry on with resume=true"
    )
