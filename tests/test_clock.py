"""The wall clock jumps by an hour, forth and back: no figure, bar, order or limit minds."""

import io
import itertools
import json
import os
import re
import time
from pathlib import Path

import pytest
from tqdm import std, tqdm

from dense2conv.bar import Bar
from dense2conv.cli import main
from dense2conv.training import checkpoint

PACKAGE = Path(__file__).parent.parent / "dense2conv"


@pytest.fixture
def jumping(monkeypatch):
    """The wall clock is an hour fast, an hour slow, …, each time it is looked at."""
    real, hours = time.time, itertools.cycle([3600, -3600])
    for module in (time, std):
        monkeypatch.setattr(module, "time", lambda: real() + next(hours))
    assert abs(time.time() - time.time()) > 7000


def train(*words):
    sizes = ["data.side=6", "model.widths=[36,17]", "train.batch=64", "checkpoint.every=10"]
    others = ["log.every=1", "wandb.mode=disabled", "parallel.device=cpu", "run.name=a"]
    return main(["train", *sizes, *others, *words])


def test_a_run_counts_its_own_time(jumping, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    assert train("train.steps=20") == 0
    seconds = time.monotonic() - began
    rows = [json.loads(line) for line in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    times = [row["time"] for row in rows]
    assert times == sorted(times)
    assert times[-1] < seconds
    for row in rows:
        assert 1 / seconds < row["steps_per_second"] < 1e6
        assert 0 <= row["input_share"] <= 1


def test_the_newest_checkpoint_is_that_of_the_last_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train("train.steps=20") == 0
    newest = Path("runs/a/checkpoints/step_00000020")
    for path in (newest, *newest.iterdir()):  # written while the clock was an hour slow
        os.utime(path, (time.time() - 3600,) * 2)
    assert checkpoint.latest(newest.parent) == newest
    assert train("train.steps=30", "resume=true") == 0
    names = sorted(path.name for path in newest.parent.glob("step_*"))
    assert names == ["step_00000020", "step_00000030"]


def shown(kind, monkeypatch):
    """How often a bar is drawn while the clock is set back by an hour."""
    real, back = time.time, [0]
    monkeypatch.setattr(std, "time", lambda: real() - back[0])
    file = io.StringIO()
    bar = kind(total=20, file=file, mininterval=0, miniters=1)
    back[0] = 3600
    for _ in range(20):
        time.sleep(0.001)
        bar.update()
    return len(re.findall(r"/20 ", file.getvalue()))


def test_a_bar_goes_on_when_the_clock_is_set_back(monkeypatch):
    assert shown(tqdm, monkeypatch) == 1
    assert shown(Bar, monkeypatch) == 21


def test_nobody_asks_the_wall_clock():
    asks = re.compile(r"\btime\.time\(|\bfrom time import\b|\bdatetime\.(now|utcnow|today)\b")
    found = [path for path in PACKAGE.rglob("*.py") if asks.search(path.read_text())]
    assert found == []
