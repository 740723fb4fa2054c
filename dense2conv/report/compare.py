"""What differs between two runs: their figures, their layers and their configurations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dense2conv.report.run_folder import RunFolder
from dense2conv.report.verdict import count, number, percent, text, whitening_nats, word

Format = Callable[[float], str]


@dataclass(frozen=True)
class Row:
    """One quantity of both runs, and second less first; all as words."""

    name: str
    first: str
    second: str
    difference: str


def _nats(value: float) -> str:
    return text(value, 3)


def _points(value: float) -> str:
    return text(100 * value, 1, " points")


_SUMMARY: tuple[tuple[str, str, Format], ...] = (
    ("objective held out, dense", "heldout_objective_dense", _nats),
    ("objective held out, convolution", "heldout_objective_conv", _nats),
    ("R − power held out, dense", "heldout_rate_minus_power_dense", _nats),
    ("R² interior, untuned", "conv_r2_interior", text),
    ("R² all units, untuned", "conv_r2", text),
    ("R² all units, tuned", "conv_r2_tuned", text),
    ("weights of the dense layer", "num_weights_dense", count),
    ("weights of the convolution", "num_weights_conv", count),
    ("seconds", "wall_seconds", count),
)
_LAYER: tuple[tuple[str, str, Format], ...] = (
    ("units", "num_units", count),
    ("weights that are zero", "zero_fraction", percent),
    ("median radius", "median_radius", text),
    ("random radius", "random_radius", text),
    ("median participation", "median_participation", text),
    ("distinct centres", "distinct_centre_fraction", percent),
    ("kernels", "num_kernels", count),
    ("left over", "left_over_fraction", percent),
    ("dead", "dead_fraction", percent),
    ("R²", "conv_r2", text),
)


def figure_rows(first: RunFolder, second: RunFolder) -> list[Row]:
    """The first layer's headline figures of both runs, where either has one."""
    gains = whitening_nats(first.summary), whitening_nats(second.summary)
    gain = _row("whitening gain, nats a unit", *gains, _nats)
    return _known([gain, *_rows(_SUMMARY, first.summary, second.summary)])


def layer_rows(first: RunFolder, second: RunFolder, layer: str) -> list[Row]:
    """One layer's figures of both runs, where either has one."""
    return _known(_rows(_LAYER, first.summary_of(layer), second.summary_of(layer)))


def config_rows(first: RunFolder, second: RunFolder) -> list[tuple[str, str, str]]:
    """(key, first, second) of every setting that differs, but for the runs' names."""
    a, b = _flat(first.config), _flat(second.config)
    missing = object()
    return [
        (key, word(a.get(key)), word(b.get(key)))
        for key in sorted(a.keys() | b.keys())
        if key != "run.name" and a.get(key, missing) != b.get(key, missing)
    ]


def _rows(
    figures: tuple[tuple[str, str, Format], ...], a: Mapping[str, Any], b: Mapping[str, Any]
) -> list[Row]:
    return [_row(words, number(a, key), number(b, key), form) for words, key, form in figures]


def _known(rows: list[Row]) -> list[Row]:
    return [row for row in rows if (row.first, row.second) != ("–", "–")]


def _row(name: str, a: float, b: float, form: Format) -> Row:
    return Row(name, form(a), form(b), _difference(b - a, _points if form is percent else form))


def _difference(value: float, form: Format) -> str:
    if not math.isfinite(value):
        return "–"
    shown = form(abs(value))
    if shown == form(0.0):
        return shown
    return ("+" if value > 0 else "−") + shown


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
