"""The claims of the README, measured: long, so run by hand with ``launch/test -m slow``."""

import json
import os
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch

from dense2conv.data import DataConfig, open_source
from dense2conv.models import DenseStack, ModelConfig
from dense2conv.structure import load
from dense2conv.training.verification import NUM_HELD_OUT

pytestmark = pytest.mark.slow

MESHES = {
    "tp2": ["parallel.tp=2"],
    "pp2": ["parallel.pp=2"],
    "dp2": ["parallel.dp=2"],
    "tp2pp2": ["parallel.tp=2", "parallel.pp=2"],
}


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Runs the demo with some overrides, once for each, and gives its summary."""
    folder = tmp_path_factory.mktemp("demo")
    summaries = {}

    def run(name: str, *words: str) -> dict:
        if name not in summaries:
            command = [sys.executable, "-m", "dense2conv", "train", "experiment=demo"]
            subprocess.run(
                [*command, f"run.name={name}", "wandb.mode=disabled", *words],
                cwd=folder,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            summaries[name] = json.loads((folder / "runs" / name / "summary.json").read_text())
        return summaries[name]

    run.folder = folder
    return run


def measured(summary: dict) -> dict[str, float]:
    """What the demo must show, each to be at least (or at most) a bound."""
    second = summary["layers"][1]
    return {
        "wall_seconds": summary["wall_seconds"],
        "zero_fraction": summary["zero_fraction"],
        "distinct_centre_fraction": summary["distinct_centre_fraction"],
        "left_over_fraction": summary["left_over_fraction"],
        "radius": summary["median_radius"] / summary["random_radius"],
        "conv_r2_interior": summary["conv_r2_interior"],
        "objective": summary["heldout_objective_conv"] / summary["heldout_objective_dense"],
        "whitening_gain": summary["whitening_gain"],
        "over_identity": summary["heldout_objective_dense"] - summary["heldout_objective_identity"],
        "over_zca": summary["heldout_objective_dense"] - summary["heldout_objective_zca"],
        "median_participation": summary["median_participation"],
        "second_radius": second["median_radius"] / second["random_radius"],
        "fewer_weights": summary["num_weights_dense"] / summary["num_weights_conv"],
        "num_kernels": summary["num_kernels"],
    }


AT_LEAST = {
    "zero_fraction": 0.95,
    "distinct_centre_fraction": 0.95,
    "conv_r2_interior": 0.80,
    "objective": 0.95,
    "whitening_gain": 0.85,
    "over_identity": 0,
    "over_zca": 0,
    "median_participation": 1.3,
    "fewer_weights": 100,
}
AT_MOST = {
    "wall_seconds": 300,
    "left_over_fraction": 0.10,
    "radius": 0.12,
    "second_radius": 0.2,
    "num_kernels": 8,
}


def check(figures: dict[str, float]) -> None:
    assert {k: figures[k] for k, bound in AT_LEAST.items() if figures[k] < bound} == {}
    assert {k: figures[k] for k, bound in AT_MOST.items() if figures[k] > bound} == {}


def test_the_demos_own_seed_and_the_median_of_three(demo):
    runs = [measured(demo(f"seed{seed}", f"seed={seed}")) for seed in range(3)]
    check(runs[0])
    check({key: statistics.median(run[key] for run in runs) for key in runs[0]})


@pytest.mark.parametrize("mesh", MESHES)
def test_a_whole_demo_on_another_mesh_has_the_same_figures(demo, mesh):
    one, other = demo("seed0"), demo(mesh, *MESHES[mesh])
    for layer, same in zip(one["layers"], other["layers"], strict=True):
        assert layer.keys() == same.keys()
        for key, value in layer.items():
            # Shares of units are compared as such: a relative difference of none means nothing.
            wanted = pytest.approx(value, rel=0.02, abs=0.001) if _is_number(value) else value
            assert same[key] == wanted, (layer["name"], key)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def test_white_noise_gives_single_pixels_and_no_whitening_gain(demo):
    summary = demo("noise", "data=noise")
    assert summary["median_participation"] == pytest.approx(1, abs=0.01)
    assert summary["median_radius"] == pytest.approx(0, abs=0.05)
    assert summary["whitening_gain"] is None
    gain = summary["heldout_rate_minus_power_dense"]
    assert gain <= summary["heldout_rate_minus_power_identity"] + 0.005
    report = (demo.folder / "runs/noise/report.html").read_text()
    assert "No convolution was found" in report


def test_permuted_pixels_give_the_same_radius_after_unpermuting(demo):
    plain, permuted = demo("seed0"), demo("permuted", "data.permute_pixels=true")
    assert permuted["median_radius"] == pytest.approx(plain["median_radius"], rel=0.02)


def test_the_extracted_network_takes_the_dense_networks_inputs_and_gives_its_units(demo):
    demo("seed0")
    run = demo.folder / "runs/seed0"
    untuned = load(run / "extracted" / "untuned").float()
    source = open_source(DataConfig(), seed=0)
    x = source.held_out(NUM_HELD_OUT)
    field = np.load(run / "fields/layer1_pruned.npz")
    dense = DenseStack(256, ModelConfig(widths=[256]))
    with torch.no_grad():
        dense.layer(0).weight.copy_(torch.from_numpy(field["weight"]))
        expected, found = dense(x)["layer1"], untuned(x)["layer1"]
    variance = (expected - expected.mean(0)).square().sum()
    r2 = 1 - float((expected - found).square().sum() / variance)
    assert r2 > json.loads((run / "summary.json").read_text())["conv_r2"] - 0.02
