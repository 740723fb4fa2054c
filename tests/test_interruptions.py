"""A week of a cluster in three minutes: torchrun, photographs, and all that ends a run too early.

As in the README's section on more processes. ``DENSE2CONV_IMAGENET=/data/imagenet/train`` takes these
photographs instead of those of scikit-image.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image
from skimage import data as photographs

from tests.training.test_checkpoint import step, tensors
from tests.training.test_metrics import history, records

pytestmark = pytest.mark.slow
STEPS = 200
WORDS = [
    "data=imagenet",
    "data.side=64",
    "data.channels=3",
    "model.widths=[128,64]",
    "train.batch=32",
    f"train.steps={STEPS}",
    "checkpoint.every=10",
    "checkpoint.keep=2",
    "log.every=1",
    "run.existing=resume",
    "parallel.device=cpu",
    "parallel.timeout_s=60",
]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
TORCHRUN += ["--rdzv-endpoint=127.0.0.1:0", "-m", "dense2conv", "train"]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if given := os.environ.get("DENSE2CONV_IMAGENET"):
        return given
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        image = Image.fromarray(getattr(photographs, name)())
        for split, number in (("train", 24), ("val", 2)):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                left, top = 5 * i, 3 * i
                box = (left, top, left + 256, top + 224)
                image.crop(box).save(folder / f"{i}.jpg", quality=92)
    return str(tmp_path / "images" / "train")


@pytest.fixture
def disk(tmp_path):
    """A small file system for the runs."""
    runs = tmp_path / "runs"
    runs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(runs)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is root's")
    yield runs
    subprocess.run(["umount", "--lazy", str(runs)], check=True)


def launch(name: str, root: str, *words: str) -> subprocess.Popen:
    command = [sys.executable, *TORCHRUN, *WORDS, f"data.root={root}", f"run.name={name}", *words]
    log = open(f"{name}.log", "a")  # noqa: SIM115, it is the process's
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def ranks(job: subprocess.Popen) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True)
    return [int(word) for word in listed.stdout.split()]


def wait_for_step(job: subprocess.Popen, name: str, number: int) -> None:
    path = Path("runs", name, "metrics.jsonl")
    while not (path.exists() and f'"step": {number},' in path.read_text()):
        assert job.poll() is None, Path(f"{name}.log").read_text()[-3000:]
        time.sleep(0.02)


def interrupt(name: str, root: str, disk: Path, meshes: list[list[str]], *words: str) -> None:
    """Killed three times, asked to end once, a full disk once; the last mesh ends it."""
    for number, mesh in zip((25, 57, 88), meshes, strict=False):
        job = launch(name, root, *words, *mesh)
        wait_for_step(job, name, number)
        os.kill(ranks(job)[number % 2], signal.SIGKILL)
        assert job.wait(120) != 0

    job = launch(name, root, *words, *meshes[3])
    wait_for_step(job, name, 115)
    job.send_signal(signal.SIGTERM)
    assert job.wait(120) != 0
    assert "is saved" in Path(f"{name}.log").read_text()

    job = launch(name, root, *words, *meshes[4])
    wait_for_step(job, name, 145)
    with suppress(OSError):  # what is free changes under our hands
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
    assert job.wait(240) != 0
    assert "No space left on device" in Path(f"{name}.log").read_text()
    (disk / "filler").unlink()

    assert launch(name, root, *words, *meshes[5]).wait(240) == 0, Path(f"{name}.log").read_text()


def assert_one_run(name: str) -> None:
    """The log tells every step once; W&B's files are of one run, and together tell every step, too."""
    lines = Path("runs", name, "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert [number for number in steps if number > 0] == list(range(1, STEPS + 1))
    parts = sorted(Path("runs", name, "wandb").glob("offline-run-*/*.wandb"))
    assert len(parts) == 6
    assert len({path.stem for path in parts}) == 1  # one id
    told = {row["train/step"] for part in parts for row in history(records(part))}
    assert told | {0} == set(range(STEPS + 1))  # 0 has pictures alone, which are not told again


def test_resumed_on_the_same_mesh_the_bits_are_those_of_an_undisturbed_run(root, disk):
    mesh = ["parallel.tp=2"]
    assert launch("whole", root, *mesh).wait(600) == 0, Path("whole.log").read_text()
    interrupt("parts", root, disk, [mesh] * 6)
    whole, parts = (tensors(step(Path("runs", name), STEPS)) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        assert value.equal(parts[key]), key
    assert_one_run("parts")


def test_resumed_on_other_meshes_the_weights_are_those_of_an_undisturbed_run(root, disk):
    words = ["train.dtype=float64"]
    tp, dp, pp = (
        [f"parallel.{axis}={2 if axis == own else 1}" for axis in ("tp", "dp", "pp")]
        for own in ("tp", "dp", "pp")
    )
    assert launch("whole", root, *words, *tp).wait(600) == 0, Path("whole.log").read_text()
    interrupt("parts", root, disk, [dp, tp, pp, dp, tp, pp], *words)
    whole, parts = (tensors(step(Path("runs", name), STEPS)) for name in ("whole", "parts"))
    for key, value in whole.items():
        if value.is_floating_point():
            error = (value - parts[key]).abs().max() / value.abs().max().clamp(min=1)
            assert error < 1e-9, f"{key}: {error:.2e}"
    assert_one_run("parts")
