"""``report.html``: one self-contained page from the files of a run folder.

Axis legend: n units, D inputs of a layer, K kernels, C channels, H and W of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dense2conv.files import write_atomically
from dense2conv.report import charts, images
from dense2conv.report.run_folder import Array, RunFolder, Snapshot, read_snapshot
from dense2conv.report.verdict import count, judge, number, percent, text, word
from dense2conv.shapes import ImageShape

PIXELS_A_MONTAGE = 60_000  # weights shown side by side, so that the page stays small
UNITS_A_MONTAGE = 36


@dataclass(frozen=True)
class Picture:
    """An image of the page: its data URI, its size on screen, what it shows."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str

    @classmethod
    def of(cls, image: Image.Image, alt: str, caption: str, density: int = 1) -> Picture:
        width, height = image.width // density, image.height // density
        return cls(images.data_uri(image), width, height, alt, caption)


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run, atomically, and return its path.

    Parts that the run has not made yet are left out, with the command that makes them. Raises
    InputError where the folder holds no part of a run.
    """
    run = RunFolder.read(Path(run_folder))
    page = render(run)
    target = run.path / "report.html"
    write_atomically(target, page)
    return target


def render(run: RunFolder) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("dense2conv.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    layers = [
        {
            "name": name,
            "title": name.replace("layer", "Layer "),
            "fields": _fields(run, name),
            "bank": _bank(run, name),
            "kernel_rows": _kernel_rows(run, name),
            "centres": Markup(_centres(run, name)),
            "histograms": [Markup(svg) for svg in _histograms(run, name)],
            "histogram_note": _histogram_note(run, name),
        }
        for name in run.layers()
    ]
    drawn = charts.curves(run.metrics, _positive(number(run.summary, "random_radius")))
    return environment.get_template("page.html.jinja").render(
        name=run.name,
        verdict=judge(run.summary),
        layers=layers,
        curves=Markup(drawn) if run.metrics else "",
        curve_rows=_curve_rows(run),
        comparison=_comparison(run.summary),
        layer_rows=_layer_rows(run.summary),
        facts=_facts(run),
        config=run.config_text,
    )


def _positive(value: float) -> float | None:
    return value if math.isfinite(value) and value > 0 else None


# --- receptive fields -----------------------------------------------------------------------------


def _fields(run: RunFolder, layer: str) -> list[Picture]:
    """The same units at the start, on the way and at the end, then pruned and in order of place."""
    steps, pruned_path = run.snapshots_of(layer)
    chosen: list[tuple[str, Snapshot]] = []
    for words, path in _milestones(steps):
        if snapshot := read_snapshot(path):
            chosen.append((words, snapshot))
    if pruned_path and (pruned := read_snapshot(pruned_path)):
        chosen.append(("pruned", pruned))
    if not chosen:
        return []
    common = set.intersection(*(set(s.units.tolist()) for _, s in chosen))
    common &= set(chosen[-1][1].units.tolist())
    units = [u for u in chosen[0][1].units.tolist() if u in common]
    num_inputs = chosen[0][1].weight.shape[1]
    if any(s.weight.shape[1] != num_inputs for _, s in chosen) or not units:
        return []
    grid = _grid(run, layer, num_inputs)
    if grid is None:
        return []
    shape, slots = grid
    most = max(4, min(UNITS_A_MONTAGE, PIXELS_A_MONTAGE // (shape.height * shape.width)))
    units = units[: min(most, math.isqrt(len(units)) ** 2 or 1)]
    units = _by_place(units, chosen[-1][1], slots, shape)
    pictures = []
    for words, snapshot in chosen:
        row_of = {unit: row for row, unit in enumerate(snapshot.units.tolist())}
        weight = snapshot.weight[[row_of[unit] for unit in units]]
        title = words if snapshot.step is None else f"{words}, step {count(snapshot.step)}"
        alt = (
            f"Receptive fields of {len(units)} units of {layer}, {title}: "
            f"{_percent_zero(weight)} of their weights are zero."
        )
        image = images.montage(_on_grid(weight, slots, shape), shape, len(units))
        caption = f"{title[0].upper()}{title[1:]}: {_percent_zero(weight)} zero"
        pictures.append(Picture.of(image, alt, caption, density=2 if image.width > 600 else 1))
    return pictures


def _by_place(
    units: list[int], last: Snapshot, slots: Array | None, shape: ImageShape
) -> list[int]:
    """The units laid out as they lie in the end: rows from the top, in a row from the left."""
    row_of = {unit: row for row, unit in enumerate(last.units.tolist())}
    weight = np.nan_to_num(_on_grid(last.weight[[row_of[u] for u in units]], slots, shape))
    strength = np.abs(weight).reshape(len(units), shape.channels, -1).max(axis=1)  # (n, H·W)
    y, x = np.divmod(strength.argmax(axis=1), shape.width)
    columns = images.montage_columns(len(units), shape)
    from_top = np.lexsort((x, y)).tolist()
    rows = [from_top[i : i + columns] for i in range(0, len(units), columns)]
    return [units[i] for row in rows for i in sorted(row, key=lambda j: (x[j], y[j]))]


def _percent_zero(weight: Array) -> str:
    return percent(float((weight == 0).mean()) if weight.size else math.nan)


def _milestones(steps: list[tuple[int, Path]]) -> list[tuple[str, Path]]:
    """First, last, and the one nearest a tenth of the run, since fields change early."""
    if len(steps) <= 1:
        return [("at the end" if s else "at the start", path) for s, path in steps]
    between = steps[1:-1]
    tenth = steps[0][0] + 0.1 * (steps[-1][0] - steps[0][0])
    during = min(between, key=lambda item: abs(item[0] - tenth)) if between else None
    picked = [("at the start", steps[0][1])]
    if during is not None:
        picked.append(("on the way", during[1]))
    return [*picked, ("at the end", steps[-1][1])]


def _grid(run: RunFolder, layer: str, num_inputs: int) -> tuple[ImageShape, Array | None] | None:
    """Where the inputs of a layer lie: the image, or the grid that the layer below discovered.

    Returns the shape to draw on and, for a discovered grid, the (D,) slot of each input on it, -1
    for an input without a place; None where neither is known.
    """
    index = int(layer[5:])
    if index == 1:
        shape = run.image_shape(num_inputs)
        return None if shape is None else (shape, None)
    below = run.of_layer(f"layer{index - 1}")
    if not {"channel", "place_y", "place_x"} <= below.keys():
        return None
    channel, y, x = (below[key].astype(np.int64) for key in ("channel", "place_y", "place_x"))
    placed = channel >= 0
    if channel.shape != (num_inputs,) or not placed.any():
        return None
    y, x = y - y[placed].min(), x - x[placed].min()
    height, width = int(y[placed].max()) + 1, int(x[placed].max()) + 1
    slots = np.where(placed, y * width + x, -1)  # (D,)
    return ImageShape(1, height, width), slots  # channels are kernels, not colours: one picture


def _on_grid(weight: Array, slots: Array | None, shape: ImageShape) -> Array:
    """(n, D) weights at their slots of the grid (n, C·H·W); empty slots stay zero.

    Several inputs may share a slot: the strongest of them is shown.
    """
    if slots is None:
        return weight
    drawn = np.zeros((len(weight), shape.numel), dtype=np.float64)
    for j in np.flatnonzero(slots >= 0).tolist():
        slot = drawn[:, slots[j]]
        drawn[:, slots[j]] = np.where(np.abs(weight[:, j]) > np.abs(slot), weight[:, j], slot)
    return drawn


# --- kernels, centres, distributions --------------------------------------------------------------


def _summary_layer(summary: Mapping[str, Any], layer: str) -> Mapping[str, Any]:
    """The entry of the summary's layer list that this layer has, by name or by place."""
    entries = summary.get("layers")
    if not isinstance(entries, list):
        return {}
    entries = [entry for entry in entries if isinstance(entry, dict)]
    for entry in entries:
        if entry.get("name") == layer:
            return entry
    index = int(layer[5:]) - 1
    return entries[index] if index < len(entries) else {}


def _lattices(run: RunFolder, layer: str) -> list[Mapping[str, Any]]:
    kernels = _summary_layer(run.summary, layer).get("kernels")
    return [k for k in kernels if isinstance(k, dict)] if isinstance(kernels, list) else []


def _pair(lattice: Mapping[str, Any], key: str) -> str:
    """A stride or an offset, given as one number, as (y, x) or under two keys."""
    value = lattice.get(key)
    if f"{key}_y" in lattice:
        value = [lattice[f"{key}_y"], lattice.get(f"{key}_x")]
    if isinstance(value, list | tuple):
        same = len(value) == 2 and value[0] == value[1]
        return str(value[0]) if same else " × ".join(str(v) for v in value)
    return word(value)


def _kernel_rows(run: RunFolder, layer: str) -> list[dict[str, str]]:
    entry = _summary_layer(run.summary, layer)
    padding = word(entry.get("padding", run.summary.get("padding")))
    return [
        {
            "kernel": str(i),
            "units": count(number(kernel, "num_units")),
            "stride": _pair(kernel, "stride"),
            "offset": _pair(kernel, "offset"),
            "coverage": percent(number(kernel, "coverage")),
            "padding": padding,
        }
        for i, kernel in enumerate(_lattices(run, layer)[:48])
    ]


def _bank(run: RunFolder, layer: str) -> Picture | None:
    banks = run.kernels.get(layer, [])
    if not banks:
        return None
    # Kernels of different sizes or of groups come as several tensors: the commonest shape is drawn.
    shapes = [b.shape[1:] for b in banks]
    shape = max(shapes, key=shapes.count)
    kernels = np.concatenate([b for b in banks if b.shape[1:] == shape]).astype(np.float64)
    lattices = _lattices(run, layer)
    total = sum(len(b) for b in banks)
    captions = [f"kernel {i}" for i in range(len(kernels))]
    if len(lattices) == total == len(kernels):
        units = [number(k, "num_units") for k in lattices]
        captions = [f"{c}: {count(u)} units" for c, u in zip(captions, units, strict=True)]
    if kernels.shape[-1] * (kernels.shape[1] if kernels.shape[1] != 3 else 1) < 12:
        captions = [c.replace(" units", "") for c in captions]
    size = f"{shape[1]}×{shape[2]}" + (f"×{shape[0]}" if shape[0] > 1 else "")
    described = ""
    if len(kernels) == 1 and shape[0] == 1:
        middle = kernels[0, 0, shape[1] // 2, shape[2] // 2]
        described = f" The centre is {middle:.2f} and the weights sum to {kernels.sum():.2f}."
    noun = "kernel" if total == 1 else "kernels"
    alt = f"{total} recovered {noun} of size {size} of {layer}.{described}"
    shown = min(len(kernels), 48)
    caption = f"{shown} of {total} {noun}, {size}." if shown < total else f"{total} {noun}, {size}."
    return Picture.of(images.kernel_bank(kernels, captions), alt, caption + described, density=2)


def _centres(run: RunFolder, layer: str) -> str:
    found = run.of_layer(layer)
    if "centre_y" not in found or "centre_x" not in found:
        return ""
    y, x = found["centre_y"].astype(np.float64), found["centre_x"].astype(np.float64)
    kernel = found.get("kernel", np.full(len(y), -1))
    if {"input_y", "input_x"} <= found.keys():  # of a kernel's centre; else of the largest weight
        y, x = (np.where(kernel >= 0, found[f"input_{a}"], b) for a, b in (("y", y), ("x", x)))
    known = np.isfinite(y) & np.isfinite(x)
    height = int(y[known].max(initial=0)) + 1
    width = int(x[known].max(initial=0)) + 1
    side = run.setting("data.side")
    if layer == "layer1" and isinstance(side, int):
        height, width = max(height, side), max(width, side)
    return charts.centre_map(y, x, kernel, found.get("gain"), height, width, found.get("alive"))


_SCORES = (
    ("radius", "Radius", "pixels"),
    ("participation", "Participation", "places"),
    ("window_mass", "Mass in the best window", "share"),
)


def _living(found: Mapping[str, Array], key: str) -> Array:
    values = found[key].astype(np.float64)
    alive = found.get("alive")
    if alive is None or alive.shape != values.shape:
        return values
    return np.asarray(values[alive.astype(bool)])


def _histograms(run: RunFolder, layer: str) -> list[str]:
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


def _histogram_note(run: RunFolder, layer: str) -> str:
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


# --- numbers --------------------------------------------------------------------------------------


def _comparison(summary: Mapping[str, Any]) -> list[dict[str, str]]:
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


def _layer_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
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


def _curve_rows(run: RunFolder) -> list[dict[str, str]]:
    """The curves' first and last values, for those who cannot see them."""
    rows = []
    for layer in charts.layer_names(run.metrics):
        for key, words in (
            ("sparsity", "weights exactly zero"), ("rate", "coding rate, nats a unit"),
            ("power", "power, nats a unit"), ("l1", "L1, nats a unit"),
            ("objective", "objective, nats a unit"), ("radius", "median radius"),
            ("dead", "dead units"),
        ):  # fmt: skip
            steps, values = charts.series(run.metrics, f"{layer}/{key}" if layer else key)
            if len(values):
                middle = len(values) // 2
                cells = [text(float(values[i]), 3) for i in (0, middle, -1)]
                rows.append(
                    {
                        "layer": layer or "layer1", "name": words, "first": cells[0],
                        "middle": cells[1], "last": cells[2], "step": count(float(steps[-1])),
                    }
                )  # fmt: skip
    return rows


def _facts(run: RunFolder) -> list[tuple[str, str]]:
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
    facts: list[tuple[str, Any]] = [
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
    return [(words, word(value)) for words, value in facts if word(value) != "–"]
