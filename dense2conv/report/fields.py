"""Receptive fields for a reader to walk through: a sheet of tiles a step, and figures of each unit.

The sheets have a pixel a weight, or a few; whoever shows them enlarges them. Of many units an even sample
is kept, and of many steps as well, so that a page of any run stays a few megabytes.

Axis legend: n units, D inputs of a layer, C channels, H and W of its grid, h and w of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from dense2conv.report import images
from dense2conv.report.run_folder import Array, RunFolder, Snapshot, read_snapshot
from dense2conv.report.verdict import count, number, percent
from dense2conv.shapes import Geometry
from dense2conv.structure.locality import receptive_fields

UNITS_A_SHEET = 256
NUMBERS_A_SHEET = 300_000  # channel values of one sheet's tiles
SMALL_TILE, LARGE_TILE = 16, 64  # pixels; smaller fields are enlarged, larger ones shrunk
STEPS = 8


@dataclass(frozen=True)
class Sheet:
    """The fields of a layer's sampled units at one step; ``figures`` has a list of n by name."""

    title: str
    image: Image.Image
    alt: str
    caption: str
    figures: dict[str, list[Any]]


@dataclass(frozen=True)
class Fields:
    """A layer's sampled units, in the order of their tiles, over the steps.

    units: (n,) their indices in the layer; found: (n,) lists of what the analysis says of them.
    """

    layer: str
    note: str
    in_colour: bool
    height: int
    width: int
    tile: tuple[int, int]
    columns: int
    units: list[int]
    found: dict[str, list[Any]]
    sheets: list[Sheet]

    def as_data(self) -> dict[str, Any]:
        """What a script needs beside the pictures; JSON has no NaN, so that is null."""
        return {
            "name": self.layer, "height": self.height, "width": self.width, "tile": self.tile,
            "columns": self.columns, "units": self.units, "found": self.found,
            "steps": [{"title": sheet.title, **sheet.figures} for sheet in self.sheets],
        }  # fmt: skip


def read_fields(run: RunFolder, layer: str) -> Fields | None:
    """The fields of a layer; None where no snapshot or no grid is known."""
    chosen = _snapshots(run, layer)
    if not chosen:
        return None
    last = chosen[-1]
    common = set.intersection(*(set(s.units.tolist()) for s in chosen))
    units = [unit for unit in last.units.tolist() if unit in common]
    geometry = run.geometry(layer, last.weight.shape[1])
    if geometry is None or not units:
        return None
    in_colour = layer == "layer1" and geometry.shape.channels == 3
    height, width = geometry.shape.height, geometry.shape.width
    block = -(-max(height, width) // LARGE_TILE)
    zoom = max(1, SMALL_TILE // max(height, width))
    tile = (-(-height // block) * zoom, -(-width // block) * zoom)
    numbers = tile[0] * tile[1] * (3 if in_colour else 1)
    units = _even_sample(units, max(16, min(UNITS_A_SHEET, NUMBERS_A_SHEET // numbers)))
    columns = max(1, min(len(units), round(math.sqrt(len(units) * tile[0] / tile[1]))))
    units = _by_place(units, last, geometry, columns)
    found = _found(run, layer, units)
    sheets = [
        _sheet(snapshot, units, geometry, in_colour, block, zoom, columns, found)
        for snapshot in chosen
    ]
    total = number(run.summary_of(layer), "num_units")
    note = f"{count(len(units))} units" + (f" of {count(total)}" if total > len(units) else "")
    if block > 1:
        note += f"; one pixel of a picture is the strongest of {block} × {block} places"
    return Fields(layer, note, in_colour, height, width, tile, columns, units, found, sheets)


def _snapshots(run: RunFolder, layer: str) -> list[Snapshot]:
    """At most STEPS steps, the first and the last among them, and the pruned layer."""
    steps, pruned = run.snapshots_of(layer)
    paths = [path for _, path in steps]
    paths = _even_sample(paths, STEPS) + ([pruned] if pruned else [])
    read = [snapshot for path in paths if (snapshot := read_snapshot(path))]
    return [s for s in read if s.weight.shape[1] == read[-1].weight.shape[1]]


def _even_sample(items: list[Any], most: int) -> list[Any]:
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _rows(snapshot: Snapshot, units: list[int]) -> Array:
    row_of = {unit: row for row, unit in enumerate(snapshot.units.tolist())}
    return np.asarray(snapshot.weight[[row_of[unit] for unit in units]])


def _by_place(units: list[int], last: Snapshot, geometry: Geometry, columns: int) -> list[int]:
    """The units laid out as they lie in the end: rows from the top, in a row from the left."""
    at = receptive_fields(torch.from_numpy(_rows(last, units)).nan_to_num(), geometry)
    y, x = at.centre_y.numpy(), at.centre_x.numpy()
    from_top = np.lexsort((x, y)).tolist()
    rows = [from_top[i : i + columns] for i in range(0, len(units), columns)]
    return [units[i] for row in rows for i in sorted(row, key=lambda j: (x[j], y[j]))]


_SCORES = (("kernel", 0), ("gain", 4), ("r2", 4), ("correlation", 4), ("channel", 0),
           ("input_y", 0), ("input_x", 0))  # fmt: skip


def _found(run: RunFolder, layer: str, units: list[int]) -> dict[str, list[Any]]:
    """What the analysis says of these units, by quantity."""
    analysis = run.of_layer(layer)
    index = np.asarray(units)
    return {
        key: _numbers(values[index], digits)
        for key, digits in _SCORES
        if (values := analysis.get(key)) is not None and len(values) > index.max()
    }


def _numbers(values: Array, digits: int) -> list[Any]:
    """Rounded numbers for JSON, whole ones without digits; null where not finite."""
    return [
        None if not math.isfinite(value) else round(value, digits) if digits else int(value)
        for value in np.asarray(values, dtype=np.float64).tolist()
    ]


def _sheet(
    snapshot: Snapshot, units: list[int], geometry: Geometry, in_colour: bool, block: int,
    zoom: int, columns: int, found: dict[str, list[Any]],
) -> Sheet:  # fmt: skip
    weight = _rows(snapshot, units)
    at = receptive_fields(torch.from_numpy(weight).nan_to_num(), geometry)
    y, x = at.centre_y, at.centre_x
    if snapshot.step is None and {"kernel", "input_y", "input_x"} <= found.keys():
        # Of a kernel's centre, which need not be its largest weight.
        on = torch.tensor(found["kernel"]) >= 0
        y, x = (
            torch.where(on, torch.tensor(found[f"input_{axis}"]), place)
            for axis, place in (("y", y), ("x", x))
        )
    zero = percent(float((weight == 0).mean()))
    title = "pruned" if snapshot.step is None else f"step {count(snapshot.step)}"
    alt = f"Receptive fields of {len(units)} units of {snapshot.layer}, {title}: "
    tiles = shrunk(on_grid(weight, geometry, in_colour), block)
    image = images.sheet(tiles.repeat(zoom, axis=2).repeat(zoom, axis=3), columns)
    finite = np.where(np.isfinite(weight), weight, 0.0)
    return Sheet(
        title=title,
        image=image,
        alt=alt + f"{zero} of their weights are zero.",
        caption=f"{title[0].upper()}{title[1:]}: {zero} zero",
        figures={
            "alive": at.alive.tolist(),
            "y": y.tolist(),
            "x": x.tolist(),
            "radius": _numbers(at.radius.numpy(), 3),
            "participation": _numbers(at.participation.numpy(), 2),
            "zero": _numbers((weight == 0).mean(axis=1), 4),
            "largest": _numbers(np.abs(finite).max(axis=1), 4),
        },
    )


def on_grid(weight: Array, geometry: Geometry, in_colour: bool) -> Array:
    """Weights (n, D) at their places (n, C, H, W), C = 3 for colour and 1 otherwise.

    Without colour several inputs may share a place: the strongest of them is shown. An empty place
    is zero.
    """
    shape = geometry.shape
    placed = geometry.placed.numpy()
    slot = (geometry.y * shape.width + geometry.x).numpy()[placed]
    if in_colour:
        slot = slot + geometry.channel.numpy()[placed] * shape.height * shape.width
    weight = weight[:, placed]
    drawn = np.zeros((len(weight), (3 if in_colour else 1) * shape.height * shape.width))
    # Inputs that share a place come in turn: the first of every place together, then the second, …
    order = np.argsort(slot, kind="stable")
    turn = np.empty_like(order)
    turn[order] = np.arange(len(slot)) - np.searchsorted(slot[order], slot[order])
    for now in range(turn.max(initial=-1) + 1):
        own = turn == now
        there = drawn[:, slot[own]]
        weaker = np.abs(weight[:, own]) <= np.abs(there)  # false for NaN, which is to be seen
        drawn[:, slot[own]] = np.where(weaker, there, weight[:, own])
    return drawn.reshape(len(weight), -1, shape.height, shape.width)


def shrunk(tiles: Array, block: int) -> Array:
    """Tiles (n, C, H, W) as (n, C, ⌈H/block⌉, ⌈W/block⌉): the strongest weight of every block."""
    if block == 1:
        return tiles
    n, channels, height, width = tiles.shape
    padded = np.pad(tiles, ((0, 0), (0, 0), (0, -height % block), (0, -width % block)))
    blocks = padded.reshape(n, channels, -(-height // block), block, -(-width // block), block)
    blocks = blocks.transpose(0, 1, 2, 4, 3, 5).reshape(*blocks.shape[:3], blocks.shape[4], -1)
    strongest = np.abs(blocks).argmax(axis=-1)[..., None]
    return np.asarray(np.take_along_axis(blocks, strongest, axis=-1)[..., 0])
