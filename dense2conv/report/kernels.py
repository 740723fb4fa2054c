"""The kernels of a layer as a reader sees them: weights, lattice, and the places they take.

Axis legend: K kernels, C channels, k kernel side, H and W of the grid of places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageColor

from dense2conv.report import images
from dense2conv.report.charts import PALETTE
from dense2conv.report.run_folder import Array, RunFolder
from dense2conv.report.units import Places, read_places
from dense2conv.report.verdict import count, number, percent, text, word

MOST_KERNELS = 48
MOST_CHANNELS = 16
NUMBERED_SIDE = 7  # up to here the weights of a kernel are told as numbers


@dataclass(frozen=True)
class Cell:
    """One weight as a coloured cell: its number, and its colours by day and in the dark."""

    number: str
    day: str
    dark: str


@dataclass(frozen=True)
class Card:
    """One kernel: its weights as cells or as a picture, its lattice, and a picture of its places."""

    name: str
    units: str
    stride: str
    offset: str
    coverage: str
    cells: list[list[Cell]]
    picture: Image.Image | None
    places: Image.Image | None


@dataclass(frozen=True)
class Bank:
    """A layer's kernels; ``caption`` says how many there are and of what size."""

    caption: str
    padding: str
    in_colour: bool
    cards: list[Card]


def read_bank(run: RunFolder, layer: str) -> Bank | None:
    """The kernels of a layer; None where it was not extracted or has none."""
    entry = run.summary_of(layer)
    listed = entry.get("kernels")
    lattices = [k for k in listed if isinstance(k, dict)] if isinstance(listed, list) else []
    weights = run.kernels.get(layer, np.empty((0, 1, 1, 1)))
    total = max(len(weights), len(lattices))
    if total == 0:
        return None
    caption = "1 kernel" if total == 1 else f"{count(total)} kernels"
    if len(weights):
        channels, height, width = weights.shape[1:]
        caption += f" of {height} × {width}" + (f" × {channels} channels" if channels > 1 else "")
    if total > MOST_KERNELS:
        caption += f"; the first {MOST_KERNELS} are shown"
    padding = word(entry.get("padding", run.summary.get("padding"))).replace("none", "no")
    places = read_places(run, layer)
    in_colour = layer == "layer1" and weights.shape[1] == 3  # deeper channels are no colours
    cards = [
        _card(
            i,
            weights[i].astype(np.float64) if i < len(weights) else None,
            lattices[i] if i < len(lattices) else {},
            places,
            in_colour,
        )
        for i in range(min(total, MOST_KERNELS))
    ]
    return Bank(caption, padding, in_colour, cards)


def _card(
    index: int, weight: Array | None, lattice: Mapping[str, Any], places: Places | None,
    in_colour: bool,
) -> Card:  # fmt: skip
    numbered = weight is not None and len(weight) == 1 and max(weight.shape) <= NUMBERED_SIDE
    return Card(
        name=f"kernel {index}",
        units=count(number(lattice, "num_units")),
        stride=_pair(lattice.get("stride"), " × "),
        offset=_pair(lattice.get("offset"), ", "),
        coverage=percent(number(lattice, "coverage")),
        cells=_cells(weight[0]) if weight is not None and numbered else [],
        picture=None if weight is None or numbered else _picture(weight, in_colour),
        places=None if places is None else _taken(index, lattice, places),
    )


def _pair(value: Any, between: str) -> str:
    """A stride or an offset, given as one number or as (y, x)."""
    if isinstance(value, list | tuple):
        same = len(value) == 2 and value[0] == value[1]
        return str(value[0]) if same else between.join(str(v) for v in value)
    return word(value)


def _cells(weight: Array) -> list[list[Cell]]:
    """The cells of one channel (k, k), over its own largest weight."""
    largest = np.abs(np.nan_to_num(weight)).max(initial=0.0) or 1.0
    day = images.diverging(weight / largest)  # (k, k, 3)
    dark = images.in_the_dark(day)
    return [
        [
            Cell(_weight(float(w)), _style("day", day[i, j]), _style("dark", dark[i, j]))
            for j, w in enumerate(row)
        ]
        for i, row in enumerate(weight)
    ]


def _style(name: str, colour: Array) -> str:
    """A cell's colour, and black or white to write on it, as the style sheet's variables."""
    ink = "#000" if images.reads_in_black(colour) else "#fff"
    return f"--{name}:#{bytes(colour.tolist()).hex()};--{name}-ink:{ink}"


def _weight(value: float) -> str:
    shown = text(value)
    return "0" if shown == "0.00" else shown


def _picture(weight: Array, in_colour: bool) -> Image.Image:
    """A kernel (C, k, k) in colour, or its channels side by side with one scale for all."""
    if not in_colour:
        strip = np.pad(weight[:MOST_CHANNELS], ((0, 0), (0, 0), (0, 1)), constant_values=np.nan)
        weight = np.concatenate(list(strip), axis=1)[None, :, :-1]  # (1, k, C·(k + 1) - 1)
    height, width = weight.shape[1:]
    return images.sheet(weight[None], columns=1).crop((0, 0, width, height))


def _taken(index: int, lattice: Mapping[str, Any], places: Places) -> Image.Image:
    """The places (H, W) of a kernel's units in its colour, empty ones of its lattice faintly."""
    pixels = np.zeros((places.height, places.width, 4), np.uint8)
    colour = ImageColor.getrgb(PALETTE[index % len(PALETTE)])
    own = (places.kernel == index) & places.known
    y, x = places.y[own].astype(int), places.x[own].astype(int)
    stride = lattice.get("stride")
    if len(y) and isinstance(stride, list) and all(isinstance(s, int) and s > 0 for s in stride):
        empty = pixels[y.min() : y.max() + 1 : stride[0], x.min() : x.max() + 1 : stride[-1]]
        empty[:] = (*colour, 56)
    pixels[y, x] = (*colour, 255)
    return Image.fromarray(pixels)
