"""The sbatch files on a real Slurm: asked to stop, pre-empted or cancelled, a run does what it should."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dense2conv.training import checkpoint
from tests.slurm.cluster import missing, open_cluster, wait_until

ROOT = Path(__file__).parent.parent.parent
SMALL = [
    "data.side=6",
    "model.widths=[36,17]",
    "train.batch=64",
    "train.dtype=float64",
    "checkpoint.every=100000",
    "log.every=5",
    "wandb.mode=disabled",
    "parallel.device=cpu",
]
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cluster")
        patch.chdir(folder)
        (folder / "slurm").symlink_to(ROOT / "slurm")
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(ROOT))
        with open_cluster(folder / "daemons") as cluster:
            yield cluster


@pytest.fixture
def cluster(shared_cluster):
    yield shared_cluster
    shared_cluster.cancel_all()


def steps_done(run: str) -> int:
    """The last step in a run's metrics."""
    metrics = Path("runs", run, "metrics.jsonl")
    whole = metrics.read_text().rpartition("\n")[0] if metrics.exists() else ""
    return json.loads(whole.splitlines()[-1])["step"] if whole else 0


def wait_for_step(run: str, step: int) -> None:
    wait_until(lambda: steps_done(run) >= step, f"step {step} of {run}")


def saved(run: str) -> Path:
    return checkpoint.latest(Path("runs", run, "checkpoints"))


def saved_step(run: str) -> int:
    return json.loads((saved(run) / "state.json").read_text())["step"]


def test_a_signalled_and_pre_empted_job_ends_with_the_weights_of_an_undisturbed_one(cluster):
    words = [*SMALL, "parallel.tp=2", "train.steps=300"]
    variables = {"NODES": "2", "PARTITION": "low", "TIME": "60", "CONTAINER": ""}
    whole, job = (
        cluster("slurm/submit", "train", f"--job-name={name}", *words, **variables).split()[-1]
        for name in ("whole", "disturbed")
    )
    cluster.wait(whole, "COMPLETED")
    run = f"disturbed-{job}"

    wait_for_step(run, 5)
    cluster("scancel", "--signal=USR1", job)  # as --signal=USR1@300 does before the time limit
    cluster.wait(job, "RUNNING", restarts=1)
    asked = saved_step(run)
    assert asked < 300

    wait_for_step(run, asked + 5)
    cluster("scancel", "--signal=STOP", job)  # Slurm lets it go on when it pre-empts it
    cluster.wait(cluster.submit("--partition=high", *TWO_NODES, "--wrap=true"), "COMPLETED")
    cluster.wait(job, "COMPLETED", restarts=2)

    log = Path(f"slurm-{job}.out").read_text()
    assert f"dense2conv: stopped by SIGUSR1 after step {asked} of 300, which is saved" in log
    assert "dense2conv: stopped by SIGTERM after step" in log
    assert saved_step(run) == 300
    for shard in saved(f"whole-{whole}").glob("*.safetensors"):
        tensors = load_file(saved(run) / shard.name)
        for name, value in load_file(shard).items():
            assert torch.equal(tensors[name], value), name
    lines = Path("runs", run, "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 301))


def test_a_sweeps_run_keeps_its_folder_through_a_requeue_and_stays_cancelled(cluster):
    Path("sweep.txt").write_text("seed=1\nseed=7 objective.l1=0.01\n")
    words = ["slurm/array.sbatch", "sweep.txt", *SMALL, "train.steps=1000000"]
    job = cluster.submit("--ntasks-per-node=1", "--array=2", *words) + "_2"
    run = f"dense2conv-{job}"
    wait_for_step(run, 5)
    cluster("scancel", "--signal=USR1", job)
    cluster.wait(job, "RUNNING", restarts=1)
    asked = saved_step(run)
    wait_for_step(run, asked + 5)
    config = Path("runs", run, "config.yaml").read_text()
    assert "seed: 7" in config
    assert "l1: 0.01" in config
    cluster("scancel", job)
    wait_until(cluster.is_idle, "the job has ended")
    assert saved_step(run) > asked
    cluster.wait(job, "CANCELLED", restarts=1)
    assert [path.name for path in Path("runs").glob("dense2conv-*")] == [run]


def test_under_torchrun_a_signalled_job_saves_and_is_not_requeued(cluster):
    words = ["slurm/torchrun.sbatch", *SMALL, "parallel.tp=2", "train.steps=1000000"]
    job = cluster.submit("--nodes=2", *words, "run.name=torchrun")
    wait_for_step("torchrun", 5)
    cluster("scancel", "--signal=USR1", job)
    cluster.wait(job, "FAILED")
    step = saved_step("torchrun")
    assert f"stopped by SIGUSR1 after step {step} " in Path(f"slurm-{job}.out").read_text()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--array=3", "slurm/array.sbatch", "two.txt"], "two.txt has no line 3"),
        (["slurm/array.sbatch", "two.txt"], "--array=1-N"),
    ],
)
def test_a_sweep_that_cannot_be_is_named(cluster, words, named):
    Path("two.txt").write_text("seed=1\nseed=2\n")
    job = cluster.submit("--ntasks-per-node=1", "--output=refused.out", *words)
    cluster.wait(job, "FAILED")
    assert named in Path("refused.out").read_text()
