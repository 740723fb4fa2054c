"""The tables of the page, as rows of words: what the run gave, by layer and by step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dense2conv.report import charts
from dense2conv.report.run_folder import RunFolder
from dense2conv.report.verdict import count, number, percent, text, word

STEPS_LISTED = 6
QUANTITIES = (
    ("sparsity", "weights exactly zero"), ("rate", "coding rate, nats a unit"),
    ("power", "power, nats a unit"), ("l1", "L1, nats a unit"),
    ("objective", "objective, nats a unit"), ("radius", "median radius"), ("dead", "dead units"),
)  # fmt: skip


@dataclass(frozen=True)
class CurveTable:
    """The training curves as numbers: a column a step, rows of (quantity, layer, values)."""

    steps: list[str]
    rows: list[tuple[str, str, list[str]]]


def comparison(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Dense against convolution, with the controls, as the rows of one table."""

    def n(key: str, digits: int = 3) -> str:
        return text(number(summary, key), digits)

    rows = [
        {
            "name": "dense layer, pruned", "weights": count(number(summary, "num_weights_dense")),
            "objective": n("heldout_objective_dense"),
            "rate": n("heldout_rate_minus_power_dense"), "r2": "1, by definition",
        },
        {
            "name": "extracted convolution",
            "weights": count(number(summary, "num_weights_conv")),
            "objective": n("heldout_objective_conv"),
            "rate": n("heldout_rate_minus_power_conv"),
            "r2": f"{n('conv_r2', 2)} untuned; {n('conv_r2_tuned', 2)} tuned; "
            f"{n('conv_r2_interior', 2)} interior "
            f"({percent(number(summary, 'interior_fraction'))} of units)",
        },
        {
            "name": "control: best scaled identity", "weights": "–",
            "objective": n("heldout_objective_identity"),
            "rate": n("heldout_rate_minus_power_identity"), "r2": "–",
        },
        {
            "name": "control: ZCA whitening", "weights": "–",
            "objective": n("heldout_objective_zca"),
            "rate": n("heldout_rate_minus_power_zca"), "r2": "–",
        },
    ]  # fmt: skip
    told = any(
        row[key] not in ("–", "1, by definition") for row in rows for key in ("objective", "rate")
    )
    return rows if told else []


def layer_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every layer's figures."""
    entries = summary.get("layers")
    rows = []
    for i, entry in enumerate(entries if isinstance(entries, list) else []):
        if not isinstance(entry, dict):
            continue
        radius, random = number(entry, "median_radius"), number(entry, "random_radius")
        rows.append(
            {
                "name": str(entry.get("name") or f"layer{i + 1}"),
                "inputs": count(number(entry, "num_inputs")),
                "units": count(number(entry, "num_units")),
                "zero": percent(number(entry, "zero_fraction"), 1),
                "radius": f"{text(radius)} / {text(random)}",
                "distinct": percent(number(entry, "distinct_centre_fraction")),
                "kernels": count(number(entry, "num_kernels")),
                "left_over": percent(number(entry, "left_over_fraction")),
                "dead": percent(number(entry, "dead_fraction")),
                "r2": text(number(entry, "conv_r2")),
            }
        )
    return rows


def curve_table(run: RunFolder) -> CurveTable:
    """What each curve was at some steps, or last before them, for those who cannot see them."""
    logged, _ = charts.series(run.metrics, "step")
    if not len(logged):
        return CurveTable([], [])
    steps = np.unique(np.linspace(0, len(logged) - 1, STEPS_LISTED).round().astype(int))
    at = logged[steps]
    rows = []
    for layer in charts.layer_names(run.metrics):
        for key, words in QUANTITIES:
            when, values = charts.series(run.metrics, f"{layer}/{key}" if layer else key)
            if len(values):
                latest = np.searchsorted(when, at, side="right") - 1
                cells = [text(float(values[i]), 3) if i >= 0 else "–" for i in latest]
                rows.append((words, layer or "layer1", cells))
    return CurveTable([count(float(step)) for step in at], rows)


def facts(run: RunFolder) -> list[tuple[str, str]]:
    """How it was run: what was given, then what came of it."""
    summary = run.summary
    axes = [f"{axis}={run.setting(f'parallel.{axis}')}" for axis in ("tp", "pp", "dp")]
    axes = [axis for axis in axes if not axis.endswith("=None")]
    side, channels = run.setting("data.side"), run.setting("data.channels")
    seed = summary.get("seed", run.setting("seed"))
    data = run.setting("data.kind")
    image = f", {channels} × {side} × {side}" if side is not None and channels is not None else ""
    seconds = number(summary, "wall_seconds")
    took = f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds:.0f} s"
    steps = run.setting("train.steps")
    logged, _ = charts.series(run.metrics, "step")
    rows: list[tuple[str, Any]] = [
        ("data", f"{data}{image}" if data is not None else None),
        ("widths", run.setting("model.widths")),
        ("non-linearity", run.setting("model.nonlinearity")),
        ("steps", steps),
        ("last step logged", count(float(logged[-1])) if len(logged) else None),
        ("batch", run.setting("train.batch")),
        ("number type", run.setting("train.dtype")),
        ("mesh", summary.get("mesh") or " × ".join(axes)),
        ("seed", seed),
        ("wall time", took if math.isfinite(seconds) else None),
    ]
    return [(words, word(value)) for words, value in rows if word(value) != "–"]
