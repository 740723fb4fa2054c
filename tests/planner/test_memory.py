"""Planned memory against what real runs of at least 64 M weights hold, on 1, 2 and 4 processes."""

import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch.distributed as dist

from dense2conv.planner import ClusterConfig, Estimate, PlanConfig
from tests.planner.plans import plan_config

# What a rank prints: its highest resident memory after two steps, the first of which makes the
# optimizer's state, and after the third, through which the second one's checkpoint waits to be written.
_MEASURED = """
import sys
import threading
from dense2conv.cli import load_config, main
from dense2conv.parallel import open_mesh
from dense2conv.training import checkpoint

def report(name):
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    sys.stdout.write(f"{name} {peak}\\n")

third_step_done = threading.Event()
reports = iter(["step", "checkpoint"])
save, write = checkpoint.Checkpoints.save, checkpoint._write_shard

def save_and_report(self, step, *arguments, **options):
    report(next(reports))
    if step == 3:
        third_step_done.set()
    save(self, step, *arguments, **options)

def wait_and_write(*arguments):
    third_step_done.wait()
    return write(*arguments)

checkpoint.Checkpoints.save, checkpoint._write_shard = save_and_report, wait_and_write
if sys.argv[1] == "idle":
    with open_mesh(load_config("train", sys.argv[2:]).parallel):
        report("step")
else:
    assert main(sys.argv[1:]) == 0
"""


def _peaks(num_ranks: int, folder, *words: str) -> dict[str, int]:
    """Bytes of the rank that holds the most, by phase."""
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5)
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(num_ranks),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _MEASURED, *words],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    lines = [line.split() for process in ranks for line in process.communicate()[0].splitlines()]
    assert not any(process.returncode for process in ranks)
    found: dict[str, int] = {}
    for line in lines:
        if line[0] in ("step", "checkpoint"):
            found[line[0]] = max(found.get(line[0], 0), int(line[1]))
    return found


SHARDED_NETWORK = {
    "parallel.shard": "weights",
    "train.compute": "bfloat16",
    "objective.scope": "network",
    "train.batch": 64,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ((1, 1, 1), {"model.widths": [8192]}),
        ((1, 1, 2), {"model.widths": [8192]}),
        ((1, 2, 1), {"model.widths": [4096], "optimizer.name": "AdamW"}),
        ((2, 1, 2), {"model.widths": [8192, 16384]}),
        ((1, 2, 2), {"model.widths": [8192], "parallel.microbatches": 2}),
        ((1, 1, 1), {"model.widths": [8192], "train.compute": "bfloat16"}),
        ((1, 2, 1), {"model.widths": [8192], "parallel.shard": "optimizer"}),
        ((1, 2, 1), {"model.widths": [4096, 8192, 4096], "data.side": 64} | SHARDED_NETWORK),
    ],
)
def test_memory_of_real_runs(mesh, changes, tmp_path):
    pp, dp, tp = mesh
    changes = {"data.kind": "noise", "data.side": 128, "train.batch": 64} | changes
    config: PlanConfig = plan_config(changes)
    config.cluster = ClusterConfig(devices=pp * dp * tp)
    config.parallel.pp, config.parallel.dp, config.parallel.tp = mesh
    planned = Estimate(config, config.parallel).stages
    words = [f"{key}={value}".replace(" ", "") for key, value in changes.items()]
    words += [f"parallel.pp={pp}", f"parallel.dp={dp}", f"parallel.tp={tp}", "parallel.device=cpu"]
    words += ["train.steps=3", "checkpoint.every=2", "wandb.mode=disabled"]
    idle = _peaks(pp * dp * tp, tmp_path, "idle", *words)["step"]
    held = {k: v - idle for k, v in _peaks(pp * dp * tp, tmp_path, "train", *words).items()}
    expected = {
        "step": max(stage.memory.step for stage in planned),
        "checkpoint": max(stage.memory.peak(True) for stage in planned),
    }
    for phase, size in expected.items():
        print(f"{phase}: planned {size / 1e6:.0f} MB, measured {held[phase] / 1e6:.0f} MB")
    assert held == pytest.approx(expected, rel=0.1)
