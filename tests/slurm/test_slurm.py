"""The sbatch files on a real Slurm: asked to stop, pre-empted or cancelled, a run does what it should."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dense2conv.cli import main
from dense2conv.training import checkpoint
from tests.ranks import on_ranks
from tests.slurm.cluster import missing, nameless, open_cluster, wait_until

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

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


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


def test_a_signalled_and_pre_empted_sweep_ends_with_the_weights_of_an_undisturbed_run(cluster):
    Path("sweep.txt").write_text("seed=1\nseed=7 objective.l1=0.01\n")
    words = [*SMALL, "parallel.tp=2", "train.steps=300"]
    submitted = [*TWO_NODES, "--array=2", "slurm/array.sbatch", "sweep.txt", *words]
    job = f"{cluster.submit(*submitted)}_2"
    run = f"dense2conv-{job}"

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
    lines = Path("runs", run, "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 301))

    alone = [*words, "seed=7", "objective.l1=0.01", f"run.root={Path('runs').absolute()}"]
    on_ranks(2, main, ["train", *alone, "run.name=alone"])
    shards = {path.name: load_file(path) for path in saved("alone").glob("*.safetensors")}
    assert len(shards) == 2
    for name, tensors in shards.items():
        disturbed = load_file(saved(run) / name)
        assert tensors.keys() == disturbed.keys()
        for key, value in tensors.items():
            assert torch.equal(disturbed[key], value), key


def test_a_cancelled_job_saves_and_stays_cancelled(cluster):
    words = [*SMALL, "train.steps=1000000", "run.name=cancelled"]
    variables = {"NODES": "1", "PARTITION": "low", "TIME": "60", "CONTAINER": ""}
    job = cluster("slurm/submit", "train", *words, **variables).split()[-1]
    wait_for_step("cancelled", 5)
    cluster("scancel", job)
    wait_until(cluster.is_idle, "the job has ended")
    cluster.wait(job, "CANCELLED")
    step = saved_step("cancelled")
    assert f"stopped by SIGTERM after step {step} " in Path(f"slurm-{job}.out").read_text()


@pytest.mark.skipif(nameless() is not None, reason=nameless() or "")
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


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_sweep_through_submitit_ends_with_two_whole_runs(cluster, nodes):
    """A job's two ranks are Slurm's tasks on two nodes, or its own processes on one."""
    words = [*SMALL, "train.steps=10", "parallel.tp=2", "hydra/launcher=submitit_slurm"]
    words += [f"hydra.launcher.nodes={nodes}", f"run.name=on{nodes}", "seed=1,2"]
    printed = cluster(sys.executable, "-m", "dense2conv", "train", "--multirun", *words)
    assert printed.splitlines()[-1] == f"runs/on{nodes}/sweep.json"
    jobs = json.loads(Path(f"runs/on{nodes}/sweep.json").read_text())
    assert [(job["name"], job["state"]) for job in jobs] == [("seed=1", "done"), ("seed=2", "done")]
    for run in (f"on{nodes}/seed=1", f"on{nodes}/seed=2"):
        assert saved_step(run) == steps_done(run) == 10
        assert len(list(saved(run).glob("*.safetensors"))) == 2
    assert not list(Path(f"runs/on{nodes}").glob("*.1")), (
        "a rank found a folder that another had made"
    )
