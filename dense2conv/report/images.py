"""Pictures of weights, as PIL images: montages of receptive fields and banks of kernels.

Drawn with numpy and Pillow: a thousand receptive fields take 0.05 s, where an axis of matplotlib
for each takes twenty.

Axis legend: n units, D inputs of a layer, K kernels, C channels, k kernel side.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from dense2conv.shapes import ImageShape, InputError

Floats = NDArray[np.float64]

GAP = (214, 217, 222)
PAPER = (255, 255, 255)
# ColorBrewer RdBu, blue below zero: readable with the common colour deficiencies.
_STOPS = np.array(
    [
        (5, 48, 97), (33, 102, 172), (67, 147, 195), (146, 197, 222), (209, 229, 240),
        (247, 247, 247),
        (253, 219, 199), (244, 165, 130), (214, 96, 77), (178, 24, 43), (103, 0, 31),
    ],
    dtype=np.float64,
)  # fmt: skip


def diverging(value: ArrayLike) -> NDArray[np.uint8]:
    """Colours of values in [-1, 1]: blue below zero, near-white at zero, red above; NaN as the gap.

    value: any shape. Returns: the same shape with a last axis of 3.
    """
    raw = np.asarray(value, dtype=np.float64)
    level = (
        np.round(127.0 * np.clip(np.nan_to_num(raw), -1.0, 1.0)) / 127.0
    )  # a PNG palette holds 256
    position = (level + 1.0) / 2.0 * (len(_STOPS) - 1)
    low = np.minimum(position.astype(int), len(_STOPS) - 2)
    share = (position - low)[..., None]
    colour = _STOPS[low] * (1.0 - share) + _STOPS[low + 1] * share
    colour[~np.isfinite(raw)] = GAP
    return np.round(colour).astype(np.uint8)


def in_the_dark(colour: ArrayLike) -> NDArray[np.uint8]:
    """The colours that the style sheet's filter makes of these in the dark: zero dark, hues kept.

    colour: (…, 3) → (…, 3). The filter is ``invert(.92) hue-rotate(180deg)`` (W3C Filter Effects).
    """
    inverted = 0.92 * 255.0 - 0.84 * np.asarray(colour, dtype=np.float64)
    rotated = inverted @ np.array(
        [[-0.574, 0.426, 0.426], [1.430, 0.430, 1.430], [0.144, 0.144, -0.856]]
    )
    return np.round(np.clip(rotated, 0.0, 255.0)).astype(np.uint8)


def reads_in_black(colour: ArrayLike) -> NDArray[np.bool_]:
    """Whether black contrasts more than white with a colour (…, 3), by WCAG's luminance."""
    share = np.asarray(colour, dtype=np.float64) / 255.0
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return np.asarray(linear @ np.array([0.2126, 0.7152, 0.0722]) > 0.179)


def _scaled(tile: Floats) -> Floats:
    """Each unit over its own largest finite |w|; a dead unit stays zero. tile: (n, ...)."""
    flat = np.abs(np.where(np.isfinite(tile), tile, 0.0)).reshape(len(tile), -1)
    limit = flat.max(axis=1, initial=0.0)
    limit[limit == 0.0] = 1.0
    return np.asarray(tile / limit.reshape((-1,) + (1,) * (tile.ndim - 1)))


def _colours(tile: Floats) -> NDArray[np.uint8]:
    """(n, C, H, W) weights to (n, H, W, 3) colours, with symmetric limits for each unit.

    One channel takes the diverging map; three are shown as RGB around mid-grey; of any other number
    the strongest channel at each place is shown.
    """
    scaled = _scaled(tile)  # (n, C, H, W)
    if tile.shape[1] == 3:
        grey = 0.5 + 0.5 * np.nan_to_num(np.moveaxis(scaled, 1, -1))  # (n, H, W, 3)
        return np.round(np.clip(grey, 0.0, 1.0) * 255.0).astype(np.uint8)
    strongest = np.nan_to_num(np.abs(scaled), nan=-1.0).argmax(axis=1)[:, None]
    return diverging(np.take_along_axis(scaled, strongest, axis=1)[:, 0])  # (n, H, W, 3)


def montage_columns(count: int, shape: ImageShape) -> int:
    """Tiles in a row, so that a montage is about square whatever the shape of a tile."""
    return max(1, min(count, round(math.sqrt(count * shape.height / shape.width))))


def montage(
    weight: ArrayLike, shape: ImageShape, max_units: int = 256, zoom: int | None = None
) -> Image.Image:
    """Receptive fields side by side, in the order given, one tile a unit.

    Every unit has its own symmetric limits, so that zero is neutral in all of them. ``zoom`` is the
    side of a weight in pixels; by default the montage comes out about 720 pixels wide.

    weight: (n, D) with D = shape.numel, an array or a tensor on the CPU.
    Raises InputError where D is not shape.numel.
    """
    values = np.asarray(weight, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != shape.numel:
        raise InputError(
            f"a montage on {shape} needs weights of shape (n, {shape.numel}), got {values.shape}; "
            "pass the ImageShape of the layer's input"
        )
    values = values[:max_units]
    count = len(values)
    if count == 0:
        return Image.new("RGB", (64, 64), GAP)
    tiles = _colours(values.reshape(count, shape.channels, shape.height, shape.width))

    columns = montage_columns(count, shape)
    rows = -(-count // columns)
    zoom = zoom or max(1, round(720 / (columns * shape.width)))
    gap = max(2, min(14, round(shape.width * zoom / 14)))
    tiles = tiles.repeat(zoom, axis=1).repeat(zoom, axis=2)  # (n, zoom H, zoom W, 3)
    height, width = tiles.shape[1:3]
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), GAP, np.uint8)
    for i, tile in enumerate(tiles):
        top = gap + (i // columns) * (height + gap)
        left = gap + (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = tile
    return Image.fromarray(canvas)


def sheet(tiles: ArrayLike, columns: int) -> Image.Image:
    """Tiles at their own size, each with a line at its right and below, for others to enlarge.

    Every tile has its own symmetric limits. So every cell of the sheet is (h + 1) × (w + 1) pixels.

    tiles: (n, C, h, w), n ≥ 1; three channels are shown as RGB around mid-grey.
    """
    values = np.asarray(tiles, dtype=np.float64)
    count, _, height, width = values.shape
    rows = -(-count // columns)
    cells = np.full((rows * columns, height + 1, width + 1, 3), GAP, np.uint8)
    cells[:count, :height, :width] = _colours(values)
    grid = cells.reshape(rows, columns, height + 1, width + 1, 3).swapaxes(1, 2)
    return Image.fromarray(grid.reshape(rows * (height + 1), columns * (width + 1), 3))


def _font(size: int) -> Any:
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError, OSError):  # a Pillow without FreeType has one small font
        return ImageFont.load_default()


def _cell_number(value: float) -> str:
    if not math.isfinite(value):
        return "?"
    text = f"{value:.2f}" if abs(value) < 9.995 else f"{value:.3g}"
    return "0" if text in ("0.00", "-0.00") else text


def kernel_bank(
    kernels: ArrayLike, captions: Sequence[str] | None = None, max_kernels: int = 48
) -> Image.Image:
    """Kernels with large pixels; with one channel and k ≤ 7, the numbers stand in the cells.

    Three channels are shown as RGB around mid-grey; any other number of channels side by side, one
    strip a kernel. Every kernel has its own symmetric limits. Drawn for a screen of double density:
    show it at half its size.

    kernels: (K, C, k, k). Raises InputError for another number of dimensions.
    """
    values = np.asarray(kernels, dtype=np.float64)
    if values.ndim != 4:
        raise InputError(f"a kernel bank is (K, C, k, k), got {values.shape}; add the missing dims")
    values = values[:max_kernels]
    count, channels, height, width = values.shape
    if values.size == 0:
        return Image.new("RGB", (64, 64), PAPER)
    numbered = channels == 1 and max(height, width) <= 7
    cell = 92 if numbered and count <= 4 else 68 if numbered else max(6, min(36, 260 // height))
    one_tile = channels in (1, 3)
    tiles = _colours(values)[:, None] if one_tile else diverging(_scaled(values)[:, :16])
    # (K, 1 or C, k, k, 3)
    strips, gap, head = tiles.shape[1], 8, 44
    tile_width = strips * (width * cell + gap) - gap
    pitch_x, pitch_y = tile_width + 36, height * cell + head + 28
    columns = max(1, min(count, 1900 // pitch_x))
    rows = -(-count // columns)
    image = Image.new("RGB", (columns * pitch_x - 16, rows * pitch_y), PAPER)
    draw = ImageDraw.Draw(image)
    for i in range(count):
        left, top = 10 + (i % columns) * pitch_x, (i // columns) * pitch_y
        caption = captions[i] if captions is not None and i < len(captions) else f"kernel {i}"
        draw.text((left, top + 8), caption, fill=(60, 64, 72), font=_font(26))
        for s in range(strips):
            for r in range(height):
                for c in range(width):
                    x, y = left + s * (width * cell + gap) + c * cell, top + head + r * cell
                    colour = tuple(int(v) for v in tiles[i, s, r, c])
                    edge = GAP if cell >= 16 else None
                    draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=colour, outline=edge)
                    if numbered:
                        luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
                        draw.text(
                            (x + cell / 2, y + cell / 2),
                            _cell_number(float(values[i, 0, r, c])),
                            fill=(20, 20, 24) if luminance > 128 else (255, 255, 255),
                            font=_font(cell * 3 // 10),
                            anchor="mm",
                        )
    return image


def data_uri(image: Image.Image) -> str:
    """The image as a PNG data URI with its gaps transparent; up to 256 colours make a palette."""
    options: dict[str, Any] = {}
    if image.mode != "RGBA":
        image = image.convert("RGB")
        options = {"transparency": GAP}
        found: Any = image.getcolors(maxcolors=256)
        if found is not None:
            pixels = np.asarray(image, dtype=np.uint32)
            packed = (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]  # (H, W)
            colours = np.array([r << 16 | g << 8 | b for _, (r, g, b) in found], dtype=np.uint32)
            colours.sort()
            image = Image.fromarray(np.searchsorted(colours, packed).astype(np.uint8))
            table = np.stack([colours >> 16, colours >> 8, colours], axis=1).astype(np.uint8)
            image.putpalette(table.tobytes())
            gap = np.flatnonzero((table == GAP).all(axis=1))
            options = {"transparency": int(gap[0])} if len(gap) else {}
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, **options)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
