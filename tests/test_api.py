"""The whole path from a script: the very lines that the package's docstring shows."""

import contextlib
import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import dense2conv
from dense2conv import Config, InputError, load, run
from tests.ranks import on_ranks

LINES = textwrap.dedent(dense2conv.__doc__.split("::\n")[1].split("\n``Config``")[0]).strip()


def _script(folder):
    """What the lines print, and what they leave in their variables."""
    os.chdir(folder)
    os.environ["WANDB_MODE"] = "disabled"
    variables, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(LINES, variables)
    return printed.getvalue(), variables["summary"]


def test_they_are_twenty():
    assert len(LINES.splitlines()) <= 20


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_alone_and_inside_torchrun(world_size, tmp_path):
    found = on_ranks(world_size, _script, str(tmp_path))
    summaries = [summary for _, summary in found]
    assert all(summary == summaries[0] for summary in summaries)
    layer = summaries[0]["layers"][0]
    assert layer["conv_r2"] > 0.5
    assert 1 <= layer["num_kernels"] < 64
    for text, _ in found:
        assert f"{layer['num_kernels']} kernels explain {layer['conv_r2']:.0%} of the dense" in text
        assert "ExtractedStack" in text
    assert (tmp_path / "runs/small/report.html").is_file()
    with torch.no_grad():
        units = load(tmp_path / "runs/small/extracted").float()(torch.randn(3, 64))["layer1"]
    assert units.shape == (3, 64)


def test_the_readme_shows_the_same_lines():
    readme = Path(__file__).parent.parent.joinpath("README.md").read_text()
    if "from dense2conv import Config" in readme:
        assert LINES in readme


def test_phases_and_resumption_by_themselves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config()
    config.run.existing, config.wandb.mode, config.parallel.device = "resume", "disabled", "cpu"
    config.data.side, config.model.widths = 6, [36, 12]
    config.train.steps, config.train.batch, config.tune.steps = 5, 64, 2
    assert run(config)["name"] == "run"
    config.train.steps = 8
    run(config)
    steps = Path("runs/run/metrics.jsonl").read_text().count('"step"')
    assert steps == 8
    run(config, "prune")
    assert len(run(config, "extract")["layers"]) == 2
    run(config, "report")
    assert Path("runs/run/report.html").is_file()


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("parallel.tp", 2, r"needs 2 processes, but 1 were started"),
        ("data.side", 1, r"data.side=1 is too small"),
        ("run.name", "a/b", r"run.name='a/b' is no folder name"),
    ],
)
def test_what_cannot_be_is_named(key, value, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config()
    group, name = key.split(".")
    setattr(getattr(config, group), name, value)
    with pytest.raises(InputError, match=named):
        run(config)
    with pytest.raises(InputError, match="command 'plan' is unknown"):
        run(Config(), "plan")
    assert not list(tmp_path.iterdir())


def test_the_package_itself_loads_nothing():
    code = "import sys, dense2conv; dir(dense2conv); print('torch' in sys.modules);"
    code += "from dense2conv import Config, run, load; print('hydra' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dense2conv.nothing  # noqa: B018
