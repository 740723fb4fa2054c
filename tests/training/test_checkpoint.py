"""A run that is resumed is the run that was never interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dense2conv.cli import main
from dense2conv.training import checkpoint

SMALL = [
    "data.side=6",
    "model.widths=[36,17]",
    "train.batch=64",
    "train.dtype=float64",
    "checkpoint.every=10",
    "checkpoint.keep=9",
    "log.every=5",
    "wandb.mode=disabled",
    "parallel.device=cpu",
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(name: str, *words: str) -> None:
    assert main(["train", *SMALL, f"run.name={name}", *words]) == 0


def dense2conv(*words: str, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dense2conv", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
        **options,
    )


def tensors(name: str, step: str) -> dict[str, torch.Tensor]:
    """Every whole tensor of a checkpoint, joined from its shards."""
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in sorted(Path("runs", name, "checkpoints", step).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for key in file.keys():  # noqa: SIM118
                parts.setdefault(key, []).append(
                    (offsets[key]["saved_offsets"][0], file.get_tensor(key))
                )
    return {k: torch.cat([t for _, t in sorted(v, key=lambda p: p[0])]) for k, v in parts.items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


@pytest.mark.parametrize("optimizer", ["prox_adam", "AdamW"])
def test_resume_equals_uninterrupted_bit_for_bit(optimizer):
    words = [f"optimizer.name={optimizer}"]
    train("whole", *words, "train.steps=30")
    train("parts", *words, "train.steps=30")
    for step in (20, 30):
        shutil.rmtree(f"runs/parts/checkpoints/step_{step:08d}")
    train("parts", *words, "train.steps=30", "resume=true")
    assert_equal(tensors("whole", "step_00000030"), tensors("parts", "step_00000030"))
    lines = [
        [json.loads(x) for x in Path(f"runs/{n}/metrics.jsonl").read_text().splitlines()]
        for n in ("whole", "parts")
    ]
    for whole, parts in zip(*lines, strict=True):
        for row in (whole, parts):
            del row["time"], row["steps_per_second"]
        assert whole == parts


def test_resume_on_other_meshes():
    train("one", "train.steps=30")
    shutil.copytree("runs/one", "runs/moved")
    for step, mesh in ((20, "parallel.tp=2"), (30, "parallel.pp=2")):
        # Go back to what was saved ten steps before, and take those steps on another mesh.
        for later in range(step, 31, 10):
            shutil.rmtree(f"runs/moved/checkpoints/step_{later:08d}", ignore_errors=True)
        words = ["run.name=moved", mesh, "resume=true", "train.steps=30"]
        done = dense2conv("train", *SMALL, *words)
        assert done.wait(120) == 0, done.stderr.read()
    one, moved = (tensors(name, "step_00000030") for name in ("one", "moved"))
    assert one.keys() == moved.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, moved[key], rtol=1e-9, atol=1e-12)


def test_a_run_killed_anywhere_resumes_to_the_same_weights():
    words = ["train.steps=120", "parallel.tp=2"]
    whole = dense2conv("train", *SMALL, "run.name=whole", *words)
    assert whole.wait(120) == 0, whole.stderr.read()
    for attempt in range(5):
        resume = ["resume=true"] if Path("runs/killed/config.yaml").exists() else []
        run = dense2conv(
            "train", *SMALL, "run.name=killed", *words, *resume, start_new_session=True
        )
        if attempt < 2:
            folder = Path("runs/killed/checkpoints")
            before = len(list(folder.glob("step_*")))
            deadline = time.monotonic() + 60
            # Kill as soon as a save has begun, which is where half a checkpoint would lie about.
            while run.poll() is None and time.monotonic() < deadline:
                if len(list(folder.glob("step_*"))) > before + attempt:
                    break
                time.sleep(0.001)
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        elif run.wait(120) == 0:
            break
    assert run.returncode == 0, run.stderr.read()
    assert_equal(tensors("whole", "step_00000120"), tensors("killed", "step_00000120"))
    steps = [
        json.loads(x)["step"] for x in Path("runs/killed/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, 121))
    assert not list(Path("runs/killed/checkpoints").glob("*.partial"))


def test_half_written_checkpoints_are_passed_over_and_swept_away():
    train("run", "train.steps=20")
    folder = Path("runs/run/checkpoints")
    (folder / "step_00000099.partial").mkdir()
    (folder / "step_00000098").mkdir()  # no state.json: never finished
    assert checkpoint.latest(folder) == folder / "step_00000020"
    train("run", "train.steps=30", "resume=true")
    assert not (folder / "step_00000099.partial").exists()


def test_only_the_newest_are_kept():
    train("run", "train.steps=50", "checkpoint.keep=2")
    kept = sorted(p.name for p in Path("runs/run/checkpoints").iterdir())
    assert kept == ["step_00000040", "step_00000050"]


@pytest.mark.parametrize("damage", ["truncated", "not json"])
def test_a_damaged_checkpoint_is_named_with_the_remedy(damage, capsys):
    train("run", "train.steps=20")
    capsys.readouterr()
    newest = Path("runs/run/checkpoints/step_00000020")
    if damage == "truncated":
        shard = next(newest.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-1000])
    else:
        (newest / "state.json").write_text("{")
    assert main(["train", *SMALL, "run.name=run", "train.steps=30", "resume=true"]) == 2
    message = capsys.readouterr().err
    assert "step_00000020" in message
    assert "delete" in message
    shutil.rmtree(newest)
    train("run", "train.steps=20", "resume=true")


def test_no_file_of_a_run_is_a_pickle():
    train(
        "run", "train.steps=10", "then=[prune,extract,report]", "tune.steps=2", "extract.samples=99"
    )
    for path in Path("runs/run").rglob("*"):
        if path.is_file():
            assert path.suffix in {".safetensors", ".json", ".jsonl", ".yaml", ".npz", ".html"}, (
                path
            )


def test_masks_stay_through_further_training():
    train("run", "train.steps=10")
    assert main(["prune", "run.name=run", "prune.sparsity=0.9", "wandb.mode=disabled"]) == 0
    pruned = tensors("run", "step_00000010_pruned")
    train("run", "train.steps=20", "resume=true")
    after = tensors("run", "step_00000020")
    for layer in ("layer1", "layer2"):
        mask = pruned[f"layers.{layer}.mask"]
        assert torch.equal(after[f"layers.{layer}.mask"], mask)
        weight = after[f"layers.{layer}.weight"]
        assert not weight[~mask].any()
        assert weight[mask].any()
        assert not torch.equal(weight, pruned[f"layers.{layer}.weight"])


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruning_removes_the_share_that_was_asked_for(scope):
    train("run", "train.steps=3", "objective.l1=0")
    words = ["prune.sparsity=0.7", f"prune.scope={scope}", "wandb.mode=disabled"]
    assert main(["prune", "run.name=run", *words]) == 0
    pruned = tensors("run", "step_00000003_pruned")
    weights = [pruned[f"layers.{layer}.weight"] for layer in ("layer1", "layer2")]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros == pytest.approx(0.7, abs=2e-3)
    assert zeros >= 0.7
