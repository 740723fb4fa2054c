"""Two runs beside each other: what differs, in what unit, and folders that are no pair of runs."""

import json
from pathlib import Path

import pytest

from dense2conv.cli import main
from dense2conv.report import write_comparison
from dense2conv.report.compare import config_rows, figure_rows, layer_rows
from dense2conv.report.run_folder import RunFolder
from dense2conv.shapes import InputError
from tests.report.run_folders import FOUND, write_log, write_run
from tests.report.test_report import Page


def change(folder: Path, **figures: object) -> None:
    (folder / "summary.json").write_text(json.dumps(FOUND | figures))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_run(tmp_path / "a", name="a"), write_run(tmp_path / "b", name="b")


def test_figures_differ_by_second_less_first(pair: tuple[Path, Path]) -> None:
    layers = [FOUND["layers"][0] | {"left_over_fraction": 0.125, "num_kernels": 1}]
    change(pair[0], layers=layers)
    layers = [FOUND["layers"][0] | {"left_over_fraction": 0.1, "num_kernels": 8}]
    change(pair[1], conv_r2=0.61, num_weights_conv=2525, layers=layers)
    first, second = map(RunFolder.read, pair)
    rows = {row.name: row for row in figure_rows(first, second)}
    assert rows["R² all units, untuned"].difference == "−0.20"
    assert rows["weights of the convolution"].difference == "+2\u202f500"
    assert rows["objective held out, dense"].difference == "0.000"
    rows = {row.name: row for row in layer_rows(first, second, "layer1")}
    assert (rows["left over"].first, rows["left over"].difference) == ("12 %", "−2.5 points")
    assert rows["kernels"].difference == "+7"
    assert "dead" not in rows  # neither has it


def test_settings_that_differ_are_listed(pair: tuple[Path, Path]) -> None:
    config = json.loads((pair[1] / "config.yaml").read_text())
    config["data"]["side"] = 9
    config["optimizer"] = {"lr": 0.1}
    del config["seed"]
    (pair[1] / "config.yaml").write_text(json.dumps(config))
    assert config_rows(*map(RunFolder.read, pair)) == [
        ("data.side", "8", "9"),
        ("optimizer.lr", "–", "0.1"),
        ("seed", "7", "–"),
    ]


def test_the_page_of_two_runs(pair: tuple[Path, Path]) -> None:
    path = write_comparison(*pair)
    assert path == pair[0] / "compare_b.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "not made yet" not in text
    assert len([s for s in page.all("script") if s.get("type") == "application/json"]) == 2
    assert len(page.all("polyline")) == 2 * (4 + 2)  # of two runs: layer 1's four, layer 2's two
    assert "b, layer2" in text
    assert "Nothing but the name." in text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "x" / "a"), write_run(tmp_path / "y" / "a")
    text = write_comparison(first, second).read_text(encoding="utf-8")
    assert f"<h1>{first} beside {second}</h1>" in text


def test_a_run_that_has_only_begun_has_a_place_beside_one_that_is_done(tmp_path: Path) -> None:
    done, begun = write_run(tmp_path / "done"), tmp_path / "begun"
    begun.mkdir()
    write_log(begun)
    for pair in ((done, begun), (begun, done)):
        text = write_comparison(*pair).read_text(encoding="utf-8")
        Page(text)
        assert "No verdict yet" in text
        assert "No config.yaml that can be read in begun," in text


def test_folders_that_are_no_pair_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/a"))
    Path("empty").mkdir()
    for words, named in (
        (["runs/a"], "report run.name=a"),
        (["runs/a", "empty", "runs/a"], "report runs/a runs/b"),
        (["runs/a", "run.name=a"], "report runs/a runs/b"),
        (["runs/a", "nowhere"], "nowhere is no folder"),
        (["runs/a", "empty"], "empty holds no part of a run"),
        (["runs/a", "runs/a"], "are one run"),
    ):
        assert main(["report", *words]) == 2
        message = capsys.readouterr().err
        assert named in message
        assert len(message.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("compare*"))
    with pytest.raises(InputError, match="one run"):
        write_comparison(Path("runs/a"), Path("runs/../runs/a"))


def test_the_command_prints_where_the_page_is(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *map(str, pair)]) == 0
    assert capsys.readouterr().out.strip() == str(pair[0] / "compare_b.html")
