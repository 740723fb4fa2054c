"""The page, the verdict and the table, from synthetic run folders."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dense2conv.report import judge, table, write_report
from dense2conv.shapes import InputError
from tests.report.run_folders import FOUND, UNITS, write_log, write_run

NOISE = FOUND | {
    "median_radius": 0.0,
    "median_participation": 1.0,
    "heldout_rate_minus_power_dense": 1.7915,
    "heldout_rate_minus_power_identity": 1.7918,
    "heldout_rate_minus_power_zca": 1.7889,
    "conv_r2": 0.97,
    "left_over_fraction": 0.01,
}


class Page(HTMLParser):
    """Start tags, and whether every one that must be closed is."""

    VOID = frozenset({"meta", "link", "img", "br", "path", "circle", "rect", "polyline"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_complete_run_gives_a_complete_page(tmp_path: Path, channels: int) -> None:
    folder = write_run(tmp_path / "run", channels)
    path = write_report(folder)
    assert path == folder / "report.html"
    assert not list(folder.glob(".report*"))
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "not made yet" not in text
    assert "A convolution was found" in text
    images = page.all("img")
    # A sheet for each of four steps; two kernels' places; kernels as pictures unless of one channel.
    assert len(images) == 2 * (4 + 2) + (2 if channels == 1 else 4)
    assert len(page.all("td")) > 25 * 2 * (channels == 1)
    assert all(image["alt"] for image in images)
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in images)
    assert len(page.all("svg")) == 2 + 6 + 1  # maps, histograms, curves
    assert "leaves its participation as it was" in text
    assert len(text) < 900_000


def test_the_page_loads_nothing_and_runs_its_own_script_alone(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    without_data = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    for harmless in ("http-equiv", "http://www.w3.org/2000/svg"):  # a name, not an address
        without_data = without_data.replace(harmless, "")
    assert "http" not in without_data
    assert "url(" not in without_data
    page = Page(text)
    script = text[text.rindex("<script>") + len("<script>") : text.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [m["content"] or "" for m in page.all("meta") if "http-equiv" in m]
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}';" in policy
    targets = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {(a["href"] or "")[1:] for a in page.all("a")} <= targets
    assert str(tmp_path) not in text


def test_a_hostile_name_and_config_stay_text(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>\"'&{{ 7*7 }}"
    text = write_report(write_run(tmp_path / "run", name=name)).read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "{{ 7*7 }}" in text
    assert [s.get("type") for s in Page(text).all("script")] == ["application/json", None]


def test_hostile_summary_and_metric_keys_stay_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    bad = "<img src=x onerror=alert(1)>"
    layers = [FOUND["layers"][0] | {"name": bad, "kernels": [{"stride": bad, "num_units": 3}]}]
    summary = FOUND | {"padding": bad, "mesh": bad, "seed": bad, "layers": layers}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": 0, f"layer2/{bad}": 1.0, f"{bad}/rate": 1.0, "layer2/rate": bad})
    )
    assert bad not in write_report(folder).read_text(encoding="utf-8")


def test_only_metrics(tmp_path: Path) -> None:
    write_log(tmp_path)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("svg")) == 1
    assert "No verdict yet" in text
    assert "dense2conv extract" in text
    assert "dense2conv train" in text
    assert (
        "<dt>last step logged</dt><dd>29</dd>" in text
    )  # the cut-off record of step 30 is skipped


def test_each_part_may_be_missing_or_broken(tmp_path: Path) -> None:
    parts = ["config.yaml", "metrics.jsonl", "summary.json", "fields/layer1_pruned.npz",
             "extracted/analysis.npz", "extracted/module.safetensors"]  # fmt: skip
    folder = write_run(tmp_path / "run")
    for path in (folder / "fields").glob("*_step*"):
        path.unlink()  # montages take the time
    for part in parts:
        kept = (folder / part).read_bytes()
        (folder / part).write_bytes(kept[: len(kept) // 2])
        Page(write_report(folder).read_text(encoding="utf-8"))
        (folder / part).unlink()
        Page(write_report(folder).read_text(encoding="utf-8"))
        (folder / part).write_bytes(kept)


def test_many_dead_units_are_counted_and_some_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with np.load(folder / "extracted" / "analysis.npz") as file:
        analysis = dict(file)
    analysis["layer1/alive"] = np.arange(UNITS) < 10
    analysis["layer1/kernel"] = np.full(UNITS, -1)
    np.savez(folder / "extracted" / "analysis.npz", **analysis)
    text = write_report(folder).read_text(encoding="utf-8")
    assert "10 of 64 units are left over; 54 dead: 10, 11, " in text
    assert ", 33 and 30 more." in text


def test_kernels_that_are_lost_are_not_said_to_be_none(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "extracted" / "module.safetensors").unlink()
    (folder / "summary.json").unlink()
    text = write_report(folder).read_text(encoding="utf-8")
    assert "No kernel was found" not in text
    assert "The kernels are not made yet" in text


def test_an_empty_or_absent_folder_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dense2conv train"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="is no folder"):
        write_report(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    evil = np.array([{"a": 1}], dtype=object)
    np.savez(folder / "fields" / "layer1_pruned.npz", weight=evil, units=evil)
    assert len(Page(write_report(folder).read_text(encoding="utf-8")).all("img")) == 14 - 1


def test_nan_and_null_everywhere(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for path in (folder / "fields").iterdir():
        path.unlink()
    for value in (float("nan"), None, "x"):
        summary = dict.fromkeys(FOUND, value)
        (folder / "summary.json").write_text(json.dumps(summary))
        text = write_report(folder).read_text(encoding="utf-8")
        assert "No verdict yet" in text
        assert not re.search(r">\s*nan", text)
        assert "nan" not in table(summary)


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({}, "found", "80 % of the 64 dense units are one kernel"),
        ({"median_radius": 3.1}, "none", "not local"),
        ({"conv_r2": 0.2}, "partial", "explains only 0.20"),
        ({"left_over_fraction": 0.8}, "partial", "not copies of a few kernels"),
        ({"num_kernels": 40}, "partial", "not copies of a few kernels"),
        ({"num_kernels": 0}, "partial", "no two units"),
        ({"num_kernels": None}, "partial", "dense2conv extract"),
        ({"conv_r2": None}, "partial", "not yet verified"),
        ({"heldout_rate_minus_power_dense": None, "median_participation": None},
         "unknown", "identity control"),
        # Edge filters in whitened pixels: no whitening to gain, but fields of many places.
        ({"heldout_rate_minus_power_dense": 0.2, "median_participation": 9.0}, "found", "80 %"),
        # One-pixel units are judged by participation where the control is missing.
        ({"heldout_rate_minus_power_dense": None, "median_participation": 1.0},
         "none", "about one pixel"),
    ],
)  # fmt: skip
def test_the_verdict_follows_the_numbers(change: dict[str, Any], level: str, words: str) -> None:
    verdict = judge(FOUND | change)
    assert verdict.level == level
    assert words in verdict.sentence


def test_white_noise_is_no_convolution() -> None:
    verdict = judge(NOISE)
    assert verdict.level == "none"
    assert verdict.title == "No convolution was found"
    assert "one pixel" in verdict.sentence
    assert "0.00 nats" in verdict.sentence
    assert "✗" in table(NOISE)


def test_nothing_is_judged_from_nothing() -> None:
    verdict = judge({})
    assert (verdict.level, verdict.headline) == ("unknown", ())


def test_table_is_a_dozen_aligned_lines() -> None:
    lines = table(FOUND).splitlines()
    assert len(lines) == 2 + 13
    assert "A convolution was found" in lines[0]
    assert any("4\u202f096 / 25" in line and "164× fewer" in line for line in lines)
    assert table({}).count("–") >= 12


def test_importing_the_report_is_light() -> None:
    code = (
        "import sys, dense2conv.report; "
        "print([m for m in ('matplotlib', 'jinja2', 'wandb', 'hydra') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
