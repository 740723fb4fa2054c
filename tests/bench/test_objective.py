"""The benchmark runs from end to end, on one process and on two; its figures are not judged here."""

import json

import pytest

from dense2conv.cli import main

SMALL = ["pairs=3", "seconds=1", "shapes=[[40,12],[12,40]]", "classes=[3,6]", "sharded=[[8,24]]"]


@pytest.mark.parametrize("tp", [1, 2])
def test_it_prints_a_table_and_leaves_its_rows(tp, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "objective", f"parallel.tp={tp}", *SMALL]) == 0
    result = json.loads((tmp_path / "runs/bench-objective/result.json").read_text())
    assert result["benchmark"] == "objective"
    assert result["machine"]["processes"] == tp
    rows = result["rows"]
    if tp == 2:
        (row,) = rows
        assert row["beside"] == "2 silent processes"
        assert (row["samples"], row["features"]) == (8, 24)
    else:
        found = {(row["objective"], row["samples"], row["candidate"]) for row in rows}
        rates = {
            ("R", m, name) for m in (40, 12) for name in ("ours", "primal", "dual", "textbook")
        }
        reductions = {
            ("ΔR", m, name)
            for m in (40, 12)
            for name in ("ours", "textbook", "published code", "ours, 6 classes")
        }
        assert found >= rates | reductions
    for row in rows:
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert row["seconds"] > 0
        assert row["peak_bytes"] > 0
    table = capfd.readouterr().out
    assert "time ratio" in table
    assert "runs/bench-objective/result.json" in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objektive"], "did you mean 'objective'"),
        (["objective", "pairz=3"], "did you mean 'pairs'"),
        (["objective", "pairs=1"], "pairs=1; use 3 or more"),
        (["objective", "shapes=[[3]]"], "shapes holds [3]"),
        (["objective", "classes=[]"], "classes=[]"),
        (["objective", "parallel.dp=2"], "parallel.dp=2"),
        (["objective", "parallel.device=gpu"], "use auto, cpu or cuda"),
    ],
)
def test_bad_words_are_named(words, message, capsys):
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_help_lists_benchmarks_and_keys(capsys):
    assert main(["bench", "--help"]) == 0
    assert "objective" in capsys.readouterr().out
    assert main(["bench", "objective", "--help"]) == 0
    assert "rounds in which all candidates take turns" in capsys.readouterr().out
