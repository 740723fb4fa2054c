"""What the numbers of a run say, in words: one sentence, the criteria behind it, a table.

The criteria are fixed here, beside the words, so that no page can claim more than its numbers:

    local        median radius ≤ half of a random row's
    surround     R − power at least 0.05 nats a unit above the best scaled identity, or fields that
                 take in two places or more (in whitened pixels the identity already whitens).
                 White noise ends in one-pixel units, with perfect locality and sharing: this is
                 the criterion that it fails.
    shared       at least half of the units are a kernel, shifted, and a kernel has at least four
                 units on average (one kernel is always few enough)
    faithful     held-out R² of the extracted network against the dense layer ≥ 0.5
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

RADIUS_SHARE = 0.5
WHITENING_NATS = 0.05
PLACES = 2.0
ONE_PLACE = 1.1
SHARED_SHARE = 0.5
UNITS_PER_KERNEL = 4
R2 = 0.5

Level = Literal["found", "partial", "none", "unknown"]


@dataclass(frozen=True)
class Criterion:
    """One number with what it is held against; ``passed`` is None where it decides nothing."""

    name: str
    value: str
    criterion: str
    passed: bool | None = None


@dataclass(frozen=True)
class Verdict:
    """The judgement of a run: its level, the sentence, and the headline numbers."""

    level: Level
    title: str
    sentence: str
    headline: tuple[Criterion, ...] = ()


def number(summary: Mapping[str, Any], key: str) -> float:
    """A finite number of the summary, or NaN."""
    value = summary.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def text(value: float, digits: int = 2, suffix: str = "") -> str:
    """A number for people; a dash where there is none."""
    if not math.isfinite(value):
        return "–"
    rounded = f"{value:.{digits}f}"
    if float(rounded) == 0.0:
        rounded = rounded.lstrip("-")
    return rounded.replace("-", "−") + suffix


def percent(value: float, digits: int = 0) -> str:
    """A share as a percentage; a share short of everything never rounds up to 100 %."""
    if not math.isfinite(value):
        return "–"
    shown = f"{100 * value:.{digits}f}"
    if float(shown) == 100.0 and value < 1.0:
        shown = f"{math.floor(1000 * value) / 10:.1f}"
    return f"{shown} %"


def count(value: float) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{value:,.0f}".replace(",", "\u202f") if math.isfinite(value) else "–"


def word(value: Any) -> str:
    """A setting for people; a dash where there is none."""
    missing = value is None or value == "" or (isinstance(value, float) and math.isnan(value))
    return "–" if missing else str(value)


def num_units(summary: Mapping[str, Any]) -> float:
    """Units of the first layer, from the per-layer list."""
    layers = summary.get("layers")
    if isinstance(layers, list) and layers and isinstance(layers[0], dict):
        return number(layers[0], "num_units")
    return math.nan


def whitening_nats(summary: Mapping[str, Any]) -> float:
    """R − power of the dense layer above the best scaled identity, held out, nats a unit."""
    return number(summary, "heldout_rate_minus_power_dense") - number(
        summary, "heldout_rate_minus_power_identity"
    )


def _at_least(value: float, bound: float) -> bool | None:
    return value >= bound if math.isfinite(value) else None


def _share_on_kernels(summary: Mapping[str, Any]) -> float:
    dead = number(summary, "dead_fraction")
    return 1.0 - number(summary, "left_over_fraction") - (dead if math.isfinite(dead) else 0.0)


def kernels_and_channels(summary: Mapping[str, Any]) -> str:
    """How many kernels, and how many of them are no mere variants of another."""
    kernels, channels = number(summary, "num_kernels"), number(summary, "num_channels")
    which = "one kernel" if kernels == 1 else f"{count(kernels)} kernels"
    if channels == 1 < kernels:
        return f"{which} that are variants of one"
    return f"{which} in {count(channels)} channels" if 1 < channels < kernels else which


def _gates(summary: Mapping[str, Any]) -> dict[str, bool | None]:
    radius, random = number(summary, "median_radius"), number(summary, "random_radius")
    kernels, units = number(summary, "num_kernels"), num_units(summary)

    whitens = _at_least(whitening_nats(summary), WHITENING_NATS)
    places = number(summary, "median_participation")
    surround = True if whitens or places >= PLACES else whitens
    if surround is None and places <= ONE_PLACE:  # the control is missing, and not needed
        surround = False

    shared = _at_least(_share_on_kernels(summary), SHARED_SHARE)
    if not math.isfinite(kernels):
        shared = None
    elif kernels < 1 or (kernels > 1 and kernels * UNITS_PER_KERNEL > units):
        shared = False
    return {
        "local": _at_least(RADIUS_SHARE * random - radius, 0.0),
        "surround": surround,
        "shared": shared,
        "faithful": _at_least(number(summary, "conv_r2"), R2),
    }


def _headline(summary: Mapping[str, Any], gates: Mapping[str, bool | None]) -> list[Criterion]:
    radius, random = number(summary, "median_radius"), number(summary, "random_radius")
    gain = whitening_nats(summary)
    possible = number(summary, "heldout_rate_minus_power_zca") - number(
        summary, "heldout_rate_minus_power_identity"
    )
    interior = number(summary, "conv_r2_interior")
    kernels = number(summary, "num_kernels")
    plural = "kernel" if kernels == 1 else "kernels"
    return [
        Criterion(
            "Weights that are zero", percent(number(summary, "zero_fraction"), 1),
            "after pruning; informs, decides nothing",
        ),
        Criterion(
            "Median radius", text(radius, 2, " px"),
            f"needs ≤ {text(RADIUS_SHARE * random)} px, half of a random row's", gates["local"],
        ),
        Criterion(
            "Whitening gain", text(gain, 2, " nats"),
            f"a unit, over the best scaled identity; needs ≥ {WHITENING_NATS}, or fields of "
            f"{PLACES:g} places (median {text(number(summary, 'median_participation'), 1)})"
            + (f"; ZCA gains {text(possible)}" if math.isfinite(possible) else ""),
            gates["surround"],
        ),
        Criterion(
            "Distinct centres", percent(number(summary, "distinct_centre_fraction")),
            "of all units; about 63 % by chance with as many units as places",
        ),
        Criterion(
            f"Units on {count(kernels)} {plural}", percent(_share_on_kernels(summary)),
            f"needs ≥ {percent(SHARED_SHARE)} and {UNITS_PER_KERNEL} units a kernel; the rest is "
            "left over or dead", gates["shared"],
        ),
        Criterion(
            "Held-out R² of the convolution", text(number(summary, "conv_r2")),
            f"against the dense layer, untuned; needs ≥ {R2}"
            + (f"; interior {text(interior)}" if math.isfinite(interior) else ""),
            gates["faithful"],
        ),
    ]  # fmt: skip


def judge(summary: Mapping[str, Any]) -> Verdict:
    """The verdict on a run, from ``summary.json``; an empty summary gives level "unknown"."""
    gates = _gates(summary)
    headline = tuple(_headline(summary, gates)) if summary else ()
    radius, random = number(summary, "median_radius"), number(summary, "random_radius")
    fields = f"median radius {text(radius)} px, {text(random)} px for a random row"
    units, kernels = num_units(summary), number(summary, "num_kernels")
    who = f"the {count(units)} dense units" if math.isfinite(units) else "the dense units"
    shared, faithful = gates["shared"], gates["faithful"]

    if gates["local"] is None:
        return Verdict(
            "unknown", "No verdict yet",
            "The run has not been analysed, so there is nothing to judge: use dense2conv extract.",
            headline,
        )  # fmt: skip
    if not gates["local"]:
        return Verdict(
            "none", "No convolution was found",
            f"The receptive fields are not local: {fields}.", headline,
        )  # fmt: skip
    if gates["surround"] is False:
        participation = number(summary, "median_participation")
        spread = (
            f" (participation {text(participation, 1)})" if math.isfinite(participation) else ""
        )
        gain = whitening_nats(summary)
        whitens = (
            f"the layer whitens nothing, {text(gain)} nats a unit over the best scaled identity"
            if math.isfinite(gain)
            else "it has no surround"
        )
        return Verdict(
            "none", "No convolution was found",
            f"The median unit sees about one pixel{spread} and {whitens}. "
            "White noise ends like this too: such locality says nothing about images.",
            headline,
        )  # fmt: skip
    if gates["surround"] is None:
        return Verdict(
            "unknown", "Local, but unproven",
            f"The fields are local ({fields}), but without the identity control this could be the "
            "one-pixel code of white noise: use dense2conv extract.", headline,
        )  # fmt: skip
    on = f"{percent(_share_on_kernels(summary))} of {who}"
    which = kernels_and_channels(summary)
    r2 = number(summary, "conv_r2")
    if shared and faithful:
        return Verdict(
            "found", "A convolution was found",
            f"{on} are {which}, shifted over the image; as a convolution they explain "
            f"{percent(r2)} of the dense layer's held-out variance.", headline,
        )  # fmt: skip
    if shared is None:
        rest = "whether they share kernels has not been tested: use dense2conv extract"
    elif not shared:
        rest = (
            f"they are not copies of a few kernels: {on} fall on {which}"
            if kernels >= 1
            else "no two units are copies of one kernel"
        )
    elif faithful is None:
        rest = f"{on} fall on {which}, not yet verified on held-out images"
    else:
        rest = (
            f"although {on} fall on {which}, the convolution explains only {text(r2)} of the "
            "dense layer's held-out variance (R²)"
        )
        interior = number(summary, "conv_r2_interior")
        if interior >= R2:
            rest += f", {text(interior)} away from the border"
    return Verdict(
        "partial", "Local fields, but no convolution yet",
        f"The fields are local ({fields}); {rest}.", headline,
    )  # fmt: skip


def table(summary: Mapping[str, Any]) -> str:
    """The run in a dozen lines for a terminal: quantity, value, and what it is held against."""

    def n(key: str) -> float:
        return number(summary, key)

    verdict = judge(summary)
    mark = {True: "✓", False: "✗", None: " "}
    gates = _gates(summary)
    dense, conv = n("num_weights_dense"), n("num_weights_conv")
    fewer = f", {count(dense / conv)}× fewer" if conv > 0 and math.isfinite(dense) else ""
    rows: list[tuple[str, str, str, bool | None]] = [
        ("weights that are zero", percent(n("zero_fraction"), 1), "after pruning", None),
        ("median radius", text(n("median_radius"), 2, " px"),
         f"random {text(n('random_radius'))} px; local if ≤ half", gates["local"]),
        ("median participation", text(n("median_participation"), 1),
         "places a unit takes in; 1 = one pixel", None),
        ("whitening gain", text(whitening_nats(summary), 3),
         f"nats a unit over identity; ≥ {WHITENING_NATS} or participation ≥ {PLACES:g}",
         gates["surround"]),
        ("distinct centres", percent(n("distinct_centre_fraction")),
         "63 % by chance, one unit a place", None),
        ("units on kernels", percent(_share_on_kernels(summary)),
         f"{kernels_and_channels(summary)}; shared if ≥ {percent(SHARED_SHARE)}",
         gates["shared"]),
        ("left over / dead",
         f"{percent(n('left_over_fraction'))} / {percent(n('dead_fraction'))}",
         "units that no kernel explains / no weights", None),
        ("R², all units", text(n("conv_r2")),
         f"convolution against dense, held out; ≥ {R2}", gates["faithful"]),
        ("R², interior / tuned",
         f"{text(n('conv_r2_interior'))} / {text(n('conv_r2_tuned'))}",
         f"{percent(n('interior_fraction'))} of units are interior", None),
        ("objective, dense / conv",
         f"{text(n('heldout_objective_dense'), 3)} / {text(n('heldout_objective_conv'), 3)}",
         "held out, nats a unit", None),
        ("controls, identity / ZCA",
         f"{text(n('heldout_objective_identity'), 3)} / {text(n('heldout_objective_zca'), 3)}",
         "the same objective without training", None),
        ("weights, dense / conv", f"{count(dense)} / {count(conv)}",
         f"{word(summary.get('padding'))} padding{fewer}", None),
    ]  # fmt: skip
    layers = summary.get("layers")
    for layer in layers[1:] if isinstance(layers, list) else []:
        rows.append(
            (f"{layer.get('name')}: radius, share", f"{text(number(layer, 'median_radius'))}, "
             f"{percent(number(layer, 'radius_ratio'))}",
             f"of {text(number(layer, 'random_radius'))} at random, on the grid found below", None)
        )  # fmt: skip
    first = max(len(row[0]) for row in rows)
    second = max(len(row[1]) for row in rows)
    lines = [f"{verdict.title}. {verdict.sentence}", ""]
    for name, value, meaning, passed in rows:
        lines.append(f"{mark[passed]} {name:<{first}}  {value:>{second}}  {meaning}".rstrip())
    return "\n".join(lines)
