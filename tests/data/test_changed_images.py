"""A run goes on with the images it was trained on, or says what has changed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dense2conv.cli import main
from dense2conv.training import checkpoint

SMALL = """data.side=6 data.resize=0 data.flip=false model.widths=[12] train.batch=8
    wandb.mode=disabled""".split()


@pytest.fixture(autouse=True)
def _images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name in ("train/a", "val/a"):
        Path("set", name).mkdir(parents=True)
        for i in range(10):
            pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(f"set/{name}/{i}.png")


def train(*words: str) -> int:
    return main(["train", "data=imagenet", "data.root=set", *SMALL, *words])


def test_a_set_that_has_changed_is_named_and_can_be_accepted(capsys):
    assert train("train.steps=3") == 0
    Path("set").rename("moved")  # is the same set elsewhere
    assert main(["train", "run.name=run", "resume=true", "data.root=moved", "train.steps=4"]) == 0
    Path("moved/train/a/9.png").unlink()
    capsys.readouterr()
    more = ["train", "run.name=run", "resume=true", "train.steps=6"]
    assert main(more) == 2
    message = capsys.readouterr().err
    before, now = re.findall(r"(\d+-[0-9a-f]{12})", message)[:2]
    assert (before[:3], now[:2]) == ("10-", "9-")
    assert f"data.accept={now}" in message
    assert main([*more, "data.accept=9-0123456789ab"]) == 2
    assert main([*more, f"data.accept={now}", "then=[prune]"]) == 0
    newest = checkpoint.latest(Path("runs/run/checkpoints"))
    assert newest.name == "step_00000006_pruned"
    assert json.loads((newest / "state.json").read_text())["extra"]["images"] == now
    assert main([*more, "train.steps=7"]) == 0
