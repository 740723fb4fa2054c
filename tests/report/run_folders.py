"""Run folders as training, pruning and extraction leave them, made of nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

SIDE, UNITS = 8, 64

FOUND: dict[str, Any] = {
    "zero_fraction": 0.95, "median_radius": 0.49, "random_radius": 3.27,
    "distinct_centre_fraction": 0.99, "num_kernels": 1, "left_over_fraction": 0.2,
    "dead_fraction": 0.0, "conv_r2": 0.81, "conv_r2_interior": 0.84, "interior_fraction": 0.56,
    "conv_r2_tuned": 0.9, "heldout_objective_dense": 1.344, "heldout_objective_conv": 1.278,
    "heldout_objective_identity": 0.21, "heldout_objective_zca": 1.13,
    "heldout_rate_minus_power_dense": 1.59, "heldout_rate_minus_power_identity": 0.24,
    "heldout_rate_minus_power_zca": 1.69, "whitening_gain": 0.93, "median_participation": 1.4,
    "num_weights_dense": 4096, "num_weights_conv": 25, "padding": "reflect",
    "wall_seconds": 93.0, "mesh": "tp=2", "seed": 7,
    "layers": [
        {"name": "layer1", "num_units": 64, "num_inputs": 64, "num_kernels": 1,
         "median_radius": 0.49, "random_radius": 3.27, "conv_r2": 0.81,
         "kernels": [{"stride": 1, "offset": [0, 0], "coverage": 0.8, "num_units": 51}]},
        {"name": "layer2", "num_units": 20, "num_inputs": 64, "num_kernels": 2,
         "kernels": [{"stride": [2, 1], "offset": [0, 0], "coverage": 0.5, "num_units": 9}]},
    ],
}  # fmt: skip


def write_log(folder: Path) -> None:
    with open(folder / "metrics.jsonl", "w") as log:
        for step in range(30):
            record = {"step": step, "objective": step * 0.05, "rate": 1.0, "sparsity": step / 30}
            record |= {"layer2/rate": 0.5, "layer2/sparsity": 0.1}
            if step % 10 == 0:
                record["radius"] = 3.0 - step / 12
            log.write(json.dumps(record) + "\n")
        log.write('{"step": 30, "objec')


def write_run(folder: Path, channels: int = 1, name: str = "demo") -> Path:
    """A complete run of two layers."""
    rng = np.random.default_rng(0)
    (folder / "fields").mkdir(parents=True)
    (folder / "extracted").mkdir()
    config = {
        "run": {"name": name}, "seed": 7, "data": {"kind": "mosaic", "side": SIDE,
        "channels": channels}, "train": {"steps": 30}, "parallel": {"tp": 2},
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    write_log(folder)
    (folder / "summary.json").write_text(json.dumps(FOUND | {"conv_r2_tuned": float("nan")}))
    units = np.arange(0, UNITS, 2)
    for layer, n, num_inputs in (("layer1", units, channels * SIDE**2), ("layer2", units[:9], 64)):
        for tag in ("step00000000", "step00000010", "step00000030", "pruned"):
            weight = rng.normal(size=(len(n), num_inputs)).astype(np.float32)
            np.savez(folder / "fields" / f"{layer}_{tag}.npz", weight=weight, units=n)
    y, x = np.divmod(np.arange(UNITS), SIDE)
    analysis: dict[str, Any] = {}
    for layer in ("layer1", "layer2"):
        scores = {
            key: rng.random(UNITS)
            for key in ("radius", "participation", "window_mass", "null_radius", "null_window_mass")
        }
        scores["null_participation"] = scores["participation"]
        scores |= {"centre_y": y, "centre_x": x, "place_y": y, "place_x": x, "gain": y - 3.5,
                   "kernel": np.where(x == 0, -1, x % 2),
                   "channel": np.where(x == 0, -1, x % 2), "alive": np.arange(UNITS) != 5,
                   "r2": np.full(UNITS, np.nan)}  # fmt: skip
        analysis |= {f"{layer}/{key}": value for key, value in scores.items()}
    np.savez(folder / "extracted" / "analysis.npz", **analysis)
    save_file(
        {
            "layers.layer1.convs.0.weight": rng.normal(size=(2, channels, 5, 5)).astype(np.float32),
            "layers.layer2.convs.0.weight": rng.normal(size=(2, 2, 3, 3)).astype(np.float32),
            "layers.layer2.bias": np.zeros(2, np.float32),
        },
        folder / "extracted" / "module.safetensors",
    )
    return folder
