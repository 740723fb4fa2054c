"""What the analysis says of a layer's units: their places, their scores, and who is left over.

Axis legend: n units of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dense2conv.report import charts
from dense2conv.report.run_folder import Array, RunFolder
from dense2conv.report.verdict import count, text

MOST_LISTED, MOST_NAMED = 200, 24
_SCORES = (
    ("radius", "Radius", "pixels"),
    ("participation", "Participation", "places"),
    ("window_mass", "Mass in the best window", "share"),
)


@dataclass(frozen=True)
class Places:
    """Where each unit looks, and on what kernel it is: y, x, kernel, known are (n,)."""

    y: Array
    x: Array
    kernel: Array
    height: int
    width: int

    @property
    def known(self) -> Array:
        """Units that have a place at all."""
        return np.asarray(np.isfinite(self.y) & np.isfinite(self.x))


@dataclass(frozen=True)
class LeftOver:
    """Living units that no kernel explains, as rows of a table, and dead ones."""

    summary: str
    rows: list[list[str]]
    dead: str


def read_places(run: RunFolder, layer: str) -> Places | None:
    """The places of a layer's units: of their kernel's centre, else of their largest weight."""
    found = run.of_layer(layer)
    if "centre_y" not in found or "centre_x" not in found:
        return None
    y, x = found["centre_y"].astype(np.float64), found["centre_x"].astype(np.float64)
    kernel = found.get("kernel", np.full(len(y), -1)).astype(np.int64)
    if {"input_y", "input_x"} <= found.keys():
        y, x = (np.where(kernel >= 0, found[f"input_{a}"], b) for a, b in (("y", y), ("x", x)))
    known = np.isfinite(y) & np.isfinite(x)
    height = int(y[known].max(initial=0)) + 1
    width = int(x[known].max(initial=0)) + 1
    side = run.setting("data.side")
    if layer == "layer1" and isinstance(side, int):
        height, width = max(height, side), max(width, side)
    return Places(y, x, kernel, height, width)


def centre_map(run: RunFolder, layer: str) -> str:
    """The map of a layer's units as SVG; empty where they have not been analysed."""
    places, found = read_places(run, layer), run.of_layer(layer)
    if places is None:
        return ""
    gain, alive = found.get("gain"), found.get("alive")
    return charts.centre_map(
        places.y, places.x, places.kernel, gain, places.height, places.width, alive
    )


def histograms(run: RunFolder, layer: str) -> list[str]:
    """The scores' distributions over the living units beside their nulls', as SVG."""
    found = run.of_layer(layer)
    unit_of = {"pixels": "pixels" if layer == "layer1" else "places of the discovered grid"}
    return [
        charts.histogram(
            _living(found, key),
            _living(found, f"null_{key}") if f"null_{key}" in found else np.array([]),
            title,
            unit_of.get(unit, unit),
        )
        for key, title, unit in _SCORES
        if key in found
    ]


def histogram_note(run: RunFolder, layer: str) -> str:
    """Says so where a null cannot differ from the score, by construction."""
    found = run.of_layer(layer)
    same = []
    for key, title, _ in _SCORES:
        if key in found and f"null_{key}" in found:
            a, b = np.sort(_living(found, key)), np.sort(_living(found, f"null_{key}"))
            if a.shape == b.shape and a.size and np.allclose(a, b, equal_nan=True, rtol=1e-4):
                same.append(title.lower())
    if not same:
        return ""
    return (
        f"Shuffling the places of a unit's weights leaves its {' and '.join(same)} as it was, so "
        "there the null coincides with the data and shows nothing."
    )


def _living(found: Mapping[str, Array], key: str) -> Array:
    values = found[key].astype(np.float64)
    alive = found.get("alive")
    if alive is None or alive.shape != values.shape:
        return values
    return np.asarray(values[alive.astype(bool)])


def left_over(run: RunFolder, layer: str) -> LeftOver | None:
    """Who is on no kernel; None where the units have not been analysed.

    Columns of a row: unit, place as row and column, radius, participation, correlation with the
    best kernel, R².
    """
    found = run.of_layer(layer)
    if not {"kernel", "alive", "centre_y", "centre_x"} <= found.keys():
        return None
    alive = found["alive"].astype(bool)
    left, dead = np.flatnonzero(alive & (found["kernel"] < 0)), np.flatnonzero(~alive)
    rows = [
        [
            str(unit),
            f"{text(float(found['centre_y'][unit]), 0)}, {text(float(found['centre_x'][unit]), 0)}",
            *(
                text(float(found[key][unit])) if key in found else "–"
                for key in ("radius", "participation", "correlation", "r2")
            ),
        ]
        for unit in left[:MOST_LISTED].tolist()
    ]
    summary = f"{count(len(left))} of {count(len(alive))} units are left over"
    if len(left) > MOST_LISTED:
        summary += f"; the first {MOST_LISTED} are listed"
    named = ", ".join(str(unit) for unit in dead[:MOST_NAMED].tolist())
    more = f" and {count(len(dead) - MOST_NAMED)} more" if len(dead) > MOST_NAMED else ""
    return LeftOver(
        summary, rows, f"{count(len(dead))} dead: {named}{more}" if named else "none dead"
    )
