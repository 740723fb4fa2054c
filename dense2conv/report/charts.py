"""Pictures of numbers, as inline SVG: curves, histograms, and maps of the units' places.

Written by hand, without a namespace or a script, so that a page can inline it; its colours are CSS
variables with a fallback, and follow the page into dark mode.

Axis legend: n units, H and W of a grid.
"""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

MUTED = "var(--muted, #59606b)"
HOLLOW = f'fill="none" stroke="{MUTED}" stroke-width="1.4"'
# Okabe and Ito's colours, without those that vanish on white or on black.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f8c2d")


def _svg(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    body = "".join(parts)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12">'
        f"<title>{html.escape(label)}</title>{body}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{MUTED}" {style}>'
        f"{html.escape(text)}</text>"
    )


def _ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers in [low, high], 1, 2, 2.5 or 5 times a power of ten apart."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _colour(index: int) -> str:
    if index < len(PALETTE):
        return f"var(--k{index}, {PALETTE[index]})"
    return f"hsl({(index * 137.508) % 360:.0f} 55% 50%)"  # the golden angle keeps neighbours apart


def _finite(value: Any) -> float:
    """A number, or NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


class _Panel:
    """One set of axes: where data go on the canvas, and the frame around them."""

    def __init__(
        self, box: tuple[float, float, float, float], x: tuple[float, float], y: tuple[float, float]
    ) -> None:
        self.left, self.top, self.width, self.height = box
        self.x, self.y = x, y

    def px(self, value: float) -> float:
        low, high = self.x
        return self.left + self.width * (value - low) / ((high - low) or 1.0)

    def py(self, value: float) -> float:
        low, high = self.y
        share = (value - low) / ((high - low) or 1.0)
        return self.top + self.height * (1.0 - min(max(share, 0.0), 1.0))

    def frame(self, title: str, x_label: str) -> list[str]:
        right, bottom = self.left + self.width, self.top + self.height
        parts = [
            _text(self.left, self.top - 10, title, style='style="fill:var(--ink,#1c2026)" '
                  'font-weight="600" font-size="13"')
        ]  # fmt: skip
        for tick in _ticks(*self.y):
            y = self.py(tick)
            parts.append(
                f'<path d="M{self.left:.1f} {y:.1f}H{right:.1f}" stroke="var(--line, #dde0e5)"/>'
            )
            parts.append(_text(self.left - 6, y + 4, f"{tick:g}", "end"))
        for tick in _ticks(*self.x, about=5):
            parts.append(_text(self.px(tick), bottom + 16, f"{tick:g}", "middle"))
        parts.append(
            f'<path d="M{self.left:.1f} {bottom:.1f}H{right:.1f}" stroke="var(--muted, #59606b)"/>'
        )
        parts.append(_text(right, bottom + 31, x_label, "end"))
        return parts


_PANELS = (
    ("sparsity", "Weights exactly zero (share)"),
    ("rate", "Coding rate R (nats a unit)"),
    ("objective", "Objective (nats a unit)"),
    ("radius", "Median radius (pixels; of deeper layers: places)"),
)


def layer_names(metrics: Iterable[Mapping[str, Any]]) -> list[str]:
    """Prefixes of the layers a log mentions; the empty one is the first layer's."""
    deeper = {m.group(1) for row in metrics for key in row if (m := re.match(r"(layer\d+)/", key))}
    return ["", *sorted(deeper, key=lambda name: int(name[5:]))]


def series(metrics: Iterable[Mapping[str, Any]], key: str) -> tuple[Floats, Floats]:
    """Steps and finite values of one quantity, in order of step; a step logged twice counts once.

    Returns: steps (s,), values (s,). After a resume the later record of a step is kept.
    """
    pairs = {_finite(row.get("step")): _finite(row.get(key)) for row in metrics if key in row}
    kept = sorted((s, v) for s, v in pairs.items() if math.isfinite(s) and math.isfinite(v))
    return np.array([s for s, _ in kept]), np.array([v for _, v in kept])


def _thin(steps: Floats, values: Floats, most: int = 240) -> tuple[Floats, Floats]:
    """At most about ``most`` points that keep every bucket's lowest and highest value."""
    if len(steps) <= most:
        return steps, values
    keep = {0, len(steps) - 1}
    for part in np.array_split(np.arange(len(steps)), most // 2):
        keep |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
    index = sorted(keep)
    return steps[index], values[index]


@dataclass(frozen=True)
class _Line:
    """One curve of every panel: what is logged under ``prefix``, and how it is drawn."""

    name: str
    metrics: Sequence[Mapping[str, Any]]
    prefix: str
    colour: str
    dash: str

    def points(self, key: str) -> tuple[Floats, Floats]:
        return series(self.metrics, f"{self.prefix}/{key}" if self.prefix else key)


def _lines(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[_Line]:
    """A line a layer; of several runs the colour is the run's and the dashes are the layer's."""
    lines = []
    for r, (name, metrics) in enumerate(runs.items()):
        for i, prefix in enumerate(layer_names(metrics)):
            layer = prefix or "layer1"
            alone = len(runs) == 1
            dash = "" if alone or i == 0 else f'stroke-dasharray="{6 * i} 4"'
            words = layer if alone else f"{name}, {layer}"
            lines.append(_Line(words, metrics, prefix, _colour(i if alone else r), dash))
    return lines


def curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], random_radius: float | None = None
) -> str:
    """Sparsity, rate, objective and radius over steps as one SVG of four panels, a line a layer.

    ``runs`` has the records of ``metrics.jsonl`` by the run's name: layer 1 unprefixed, others
    ``layer2/…``. The limits ignore the first 2 % of the steps of objective and rate, which start far
    off; what lies outside is drawn on the frame. Values that are not finite are left out.
    """
    lines = _lines(runs)
    wide, high = 470.0, 250.0
    parts: list[str] = []
    said: list[str] = []
    logged = (_finite(row.get("step")) for metrics in runs.values() for row in metrics)
    last_step = max((step for step in logged if math.isfinite(step)), default=1.0)
    last_step = max(last_step, 1.0)
    for number, (key, title) in enumerate(_PANELS):
        box = (56 + wide * (number % 2), 30 + high * (number // 2), wide - 76, high - 84)
        drawn = [(line, *line.points(key)) for line in lines]
        settled = [
            v[s >= last_step * 0.02] if key in ("rate", "objective") and len(v) > 50 else v
            for _, s, v in drawn
        ]
        everything = np.concatenate(settled) if settled else np.array([])
        panel = _Panel(box, (0.0, last_step), _limits(key, everything, random_radius))
        parts += panel.frame(title, "step")
        if everything.size == 0:
            parts.append(_text(box[0] + box[2] / 2, box[1] + box[3] / 2, "not logged", "middle"))
            continue
        if key == "radius" and random_radius:
            y = panel.py(random_radius)
            parts.append(
                f'<path d="M{box[0]:.1f} {y:.1f}h{box[2]:.1f}" stroke="var(--muted, #59606b)" '
                'stroke-dasharray="5 4"/>'
            )
            note = f"a random row: {random_radius:.2f}"
            parts.append(_text(box[0] + box[2], y + 15, note, "end"))
        for line, steps, values in drawn:
            if not len(steps):
                continue
            said.append(f"{line.name} {key} from {values[0]:.3g} to {values[-1]:.3g}")
            steps, values = _thin(steps, values)
            points = " ".join(
                f"{panel.px(s):.1f},{panel.py(v):.1f}"
                for s, v in zip(steps.tolist(), values.tolist(), strict=True)
            )
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{line.colour}" {line.dash} '
                'stroke-width="1.8" stroke-linejoin="round"/>'
            )
            if len(steps) == 1:
                parts.append(
                    f'<circle cx="{panel.px(float(steps[0])):.1f}" '
                    f'cy="{panel.py(float(values[0])):.1f}" r="3" fill="{line.colour}"/>'
                )
    bottom = 2 * high
    if len(lines) > 1:
        pitch = min(220.0, 2 * wide / max(4, len(lines)))
        for index, line in enumerate(lines):
            x = 56 + pitch * index
            parts.append(
                f'<path d="M{x:.0f} {bottom:.0f}h24" stroke="{line.colour}" {line.dash} '
                'stroke-width="3"/>'
            )
            parts.append(_text(x + 30, bottom + 4, line.name))
        bottom += 14
    label = "Curves over training steps. " + "; ".join(said) if said else "No curve was logged."
    return _svg(2 * wide, bottom, label, parts)


def _limits(key: str, values: Floats, random_radius: float | None) -> tuple[float, float]:
    """The vertical axis of a panel: shares from 0 to 1, radii from 0, others around what there is."""
    if key == "sparsity" or values.size == 0:
        return 0.0, 1.0
    low, top = float(values.min()), float(values.max())
    if key == "radius":
        low, top = 0.0, max(top, random_radius or 0.0)
    margin = 0.05 * ((top - low) or abs(top) or 1.0)
    return (low if key == "radius" else low - margin), top + margin


def histogram(values: ArrayLike, null: ArrayLike, title: str, unit: str, num_bins: int = 28) -> str:
    """Distribution of one score over the units (filled) against its null (outline), as SVG.

    values, null: any number of units each; what is not finite is left out. Heights are shares.
    """
    data = np.asarray(values, dtype=np.float64).ravel()
    other = np.asarray(null, dtype=np.float64).ravel()
    data, other = data[np.isfinite(data)], other[np.isfinite(other)]
    both = np.concatenate([data, other])
    if both.size == 0:
        both = np.array([0.0, 1.0])
    low, high = min(0.0, float(both.min())), float(both.max())
    edges = np.linspace(low, high if high > low else low + 1.0, num_bins + 1)
    shares = [np.histogram(v, edges)[0] / max(len(v), 1) for v in (data, other)]
    top = max(float(s.max()) for s in shares) or 1.0
    panel = _Panel((46, 30, 258, 150), (float(edges[0]), float(edges[-1])), (0.0, top * 1.04))
    parts = panel.frame(title, unit)
    base = panel.py(0.0)
    for i, share in enumerate(shares[0].tolist()):
        if share > 0:
            x0, x1, y = panel.px(edges[i]), panel.px(edges[i + 1]), panel.py(share)
            parts.append(
                f'<rect x="{x0 + 0.5:.1f}" y="{y:.1f}" width="{x1 - x0 - 1:.1f}" '
                f'height="{base - y:.1f}" fill="{_colour(0)}"/>'
            )
    if other.size:
        path = f"M{panel.px(edges[0]):.1f} {base:.1f}"
        for i, share in enumerate(shares[1].tolist()):
            path += f"V{panel.py(share):.1f}H{panel.px(edges[i + 1]):.1f}"
        path += f"V{base:.1f}"
        parts.append(f'<path d="{path}" fill="none" stroke="{_colour(1)}" stroke-width="1.6"/>')

    def middle(v: Floats) -> str:
        return f"{np.median(v):.3g}" if v.size else "none"

    label = f"{title}: median {middle(data)} over {data.size} units; null median {middle(other)}"
    return _svg(320, 214, label, parts)


def centre_map(
    y: ArrayLike,
    x: ArrayLike,
    kernel: ArrayLike,
    gain: ArrayLike | None,
    height: int,
    width: int,
    alive: ArrayLike | None = None,
    max_units: int = 3000,
) -> str:
    """Every living unit as a dot at its place, as SVG: colour = kernel, area = |gain|.

    Left-over units (kernel -1) are hollow; dead ones are not drawn. Units that share a place stand
    on a small ring around it. Of more than ``max_units`` an even sample is drawn, and the legend
    says so.

    y, x, kernel, gain, alive: (n,) each. height, width: the grid's, in places.
    """
    rows, columns = np.asarray(y, dtype=np.float64), np.asarray(x, dtype=np.float64)
    kernels = np.asarray(kernel).astype(np.int64)
    size = np.ones(len(rows)) if gain is None else np.abs(np.asarray(gain, dtype=np.float64))
    drawn = np.isfinite(rows) & np.isfinite(columns)
    if alive is not None:
        drawn &= np.asarray(alive).astype(bool)
    index = np.flatnonzero(drawn)
    total = len(index)
    if total > max_units:
        index = index[np.linspace(0, total - 1, max_units).round().astype(int)]
    side = 480.0
    cell = side / max(height, width, 1)
    top, left = 10.0, 10.0
    wide, high = cell * width, cell * height

    shared = kernels >= 0
    typical = size[shared & np.isfinite(size)]
    scale = float(np.median(typical)) if typical.size and np.median(typical) > 0 else 1.0
    scaled = np.sqrt(np.nan_to_num(size / scale, nan=1.0, posinf=1.0))
    radius = np.clip(0.30 * scaled, 0.12, 0.44)

    parts = [
        f'<rect x="{left}" y="{top}" width="{wide:.1f}" height="{high:.1f}" '
        'fill="var(--panel, #f6f7f9)" stroke="var(--line, #dde0e5)"/>'
    ]
    if max(height, width) <= 64:
        grid = "".join(f"M{left + cell * i:.1f} {top}v{high:.1f}" for i in range(1, width))
        grid += "".join(f"M{left} {top + cell * i:.1f}h{wide:.1f}" for i in range(1, height))
        parts.append(f'<path d="{grid}" stroke="var(--line, #dde0e5)" stroke-width="0.6"/>')
    places = Counter(zip(rows[index].tolist(), columns[index].tolist(), strict=True))
    seen: Counter[tuple[float, float]] = Counter()
    for i in index.tolist():
        place = (float(rows[i]), float(columns[i]))
        crowd, turn = places[place], seen[place]
        seen[place] += 1
        angle = 2 * math.pi * turn / crowd
        away, shrink = (0.26, 0.62) if crowd > 1 else (0.0, 1.0)
        cx = left + cell * (place[1] + 0.5 + away * math.cos(angle))
        cy = top + cell * (place[0] + 0.5 + away * math.sin(angle))
        r = max(1.2, cell * float(radius[i]) * shrink)
        if shared[i]:
            paint, what = f'fill="{_colour(int(kernels[i]))}"', f"kernel {kernels[i]}"
        else:
            paint, what = HOLLOW, "left over"
        tip = f"<title>unit {i}, {what}, ({place[0]:g}, {place[1]:g})</title>"
        tip = tip if total <= 600 else ""
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{r:.1f}" {paint}>{tip}</circle>')

    counts = Counter(kernels[drawn].tolist())
    left_over = counts.pop(-1, 0)
    legend = [(f"kernel {k}: {n} units", k) for k, n in counts.most_common(8)]
    if len(counts) > 8:
        rest = sum(counts.values()) - sum(n for _, n in counts.most_common(8))
        legend.append((f"{len(counts) - 8} further kernels: {rest} units", -2))
    legend.append((f"left over: {left_over} units", -1))
    y0 = top + high + 24
    for number, (words, k) in enumerate(legend):
        lx, ly = left + 6 + 250 * (number % 2), y0 + 20 * (number // 2)
        paint = HOLLOW if k == -1 else f'fill="{MUTED if k < 0 else _colour(k)}"'
        parts.append(f'<circle cx="{lx}" cy="{ly - 4:.1f}" r="5" {paint}/>')
        parts.append(_text(lx + 12, ly, words))
    bottom = y0 + 20 * ((len(legend) + 1) // 2) - 8
    if total > max_units:
        parts.append(_text(left, bottom + 8, f"an even sample of {max_units} of {total} units"))
        bottom += 18
    label = (
        f"Map of {total} living units on a grid of {height} by {width} places: "
        f"{sum(counts.values())} belong to {len(counts)} kernels, {left_over} are left over."
    )
    return _svg(max(wide + 20, 500), bottom, label, parts)
