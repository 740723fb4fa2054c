"""The benchmark of loading runs from end to end; its figures are not judged here."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dense2conv.bench.data_rivals import RIVALS, Task
from dense2conv.cli import main

SMALL = ["pairs=3", "seconds=1", "sides=[16]", "batch=4"]


def test_it_prints_a_table_with_the_plan_and_leaves_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("plan.json").write_text(json.dumps({"best": {"images_per_second": 5000.0}}))
    assert main(["bench", "data", *SMALL, "plan=plan.json"]) == 0
    table = capsys.readouterr().out
    result = json.loads(Path("runs/bench-data/result.json").read_text())
    rows = {row["candidate"]: row for row in result["rows"]}
    assert rows.keys() | result["left_out"].keys() == {"ours", *RIVALS}
    assert {"ours", "Pillow", "Pillow, draft", "DataLoader, Pillow draft"} <= rows.keys()
    for name, reason in result["left_out"].items():
        assert f"without {name}: {reason}" in table
        assert "needs the package" in reason
    for row in rows.values():
        assert (row["side"], row["resize"]) == (16, 18)
        assert row["images_per_second"] > 0
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
    assert rows["ours"]["decibels"] > rows["Pillow, draft"]["decibels"]
    cores = 5000 / rows["ours"]["images_per_second"]
    assert f"the plan takes 5000 images/s: {cores:.1f} cores at 16" in table
    assert "dense2conv plan counts on 874 at 16 images/s and core" in table
    assert "runs/bench-data/result.json" in table


def test_rivals_make_batches_of_the_pictures_in_a_folder(tmp_path):
    """A picture of one colour comes out as that colour, whoever resizes it."""
    (tmp_path / "train/a").mkdir(parents=True)
    Image.new("RGB", (300, 200), (200, 100, 50)).save(tmp_path / "train/a/0.jpg", quality=95)
    paths = sorted(tmp_path.glob("train/*/*"))
    task = Task(paths, 16, 18, 3, tmp_path, np.random.default_rng(0))
    for name in ("Pillow", "Pillow, draft", "Pillow, draft 2×", "DataLoader, Pillow draft"):
        for _ in range(2):
            batch = RIVALS[name].loader(task)()
            assert batch.shape == (3, 3, 16, 16)
            assert (
                batch.float().mean((0, 2, 3)) - batch.new_tensor([200, 100, 50])
            ).abs().max() < 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sides=[1]"], "sides=[1]"),
        (["pairs=2"], "pairs=2; use 3 or more"),
        (["batch=0"], "batch=0"),
        (["parallel.tp=2"], "one process"),
        (["plan=absent.json"], "plan=absent.json is no plan"),
        (["data.root=absent"], "data.root=absent holds no train/CLASS/IMAGE"),
    ],
)
def test_bad_words_are_named(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "data", *words]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
