"""Pruning and extraction give the same figures on any number of processes."""

import json
import os
import shutil

import pytest
import torch

from dense2conv.cli import load_config, main
from dense2conv.parallel import open_mesh
from dense2conv.phases import run_phases
from dense2conv.structure import load
from tests.ranks import on_ranks

SMALL = [
    "data.side=8",
    "model.widths=[64,21]",
    "train.steps=150",
    "train.batch=128",
    "optimizer.lr=0.05",
    "train.dtype=float64",
    "extract.samples=1000",
    "tune.steps=10",
    "prune.sparsity=0.9",
    "wandb.mode=disabled",
    "parallel.device=cpu",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    here = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["train", *SMALL, "run.name=run"]) == 0
    finally:
        os.chdir(here)
    return folder


def _prune_and_extract(root):
    """Prune and extract on the ranks that run this, in their copy of the trained run."""
    world_size = int(os.environ["WORLD_SIZE"])
    root = f"{root}/{world_size}"
    words = ["run.name=run", f"run.root={root}", f"parallel.tp={world_size}"]
    config = load_config("prune", words)
    with open_mesh(config.parallel) as mesh:
        for command in ("prune", "extract"):
            run_phases(command, config, mesh)


def _figures(root, world_size):
    """The summary and the extracted network that ``world_size`` ranks have left."""
    on_ranks(world_size, _prune_and_extract, str(root))
    run = root / str(world_size) / "run"
    return json.loads((run / "summary.json").read_text()), load(run / "extracted")


def test_the_same_figures_and_the_same_module_on_1_2_and_4_ranks(trained, tmp_path):
    for world_size in (1, 2, 4):
        shutil.copytree(trained / "runs", tmp_path / str(world_size))
    one, extracted = _figures(tmp_path, 1)
    x = torch.randn(20, 64, dtype=torch.float64)
    expected = extracted(x)
    assert one["zero_fraction"] >= 0.9
    for world_size in (2, 4):
        other, extracted = _figures(tmp_path, world_size)
        for a, b in zip(one["layers"], other["layers"], strict=True):
            assert a.keys() == b.keys()
            for key, value in a.items():
                if isinstance(value, float):
                    assert b[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key
                else:
                    assert b[key] == value, key
        found = extracted(x)
        for name, z in expected.items():
            torch.testing.assert_close(found[name], z, rtol=1e-6, atol=1e-8)
