"""Bytes of any picture → upright uint8 pixels, or one sentence on why not."""

from __future__ import annotations

import importlib
import io
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.nn import functional as F

from dense2conv.shapes import InputError

MAX_PIXELS = 178_956_970  # Pillow's bound as well; a picture of that size is 0.5 GB
_MAX_ENLARGED_ASPECT = 100
# A JPEG that is to be resized is decoded at ½, ¼ or ⅛ while it stays that many times as large as
# asked for. On 256 ImageNet photographs at 36 and 72 pixels that leaves 42.5 dB (median) to the
# picture that is decoded whole, and at least 94 % of its power up to 0.4 cycles a pixel; factor 1,
# as in Pillow's draft, leaves 32 and 36 dB and 74 %. Another library's resizing of the whole picture
# differs by 33 to 37 dB.
_REDUNDANCY = 2
DECODING = 2  # raised when the same file gives other pixels than before
_FACTORS = (8, 4, 2)  # that are as quick as a smaller picture; the other eighths are slow
# Formats that are pictures and nothing else: Pillow's others include some that run programs.
Image.init()
_FORMATS = [
    name
    for name in "JPEG JPEG2000 PNG GIF BMP DIB WEBP AVIF TIFF PPM TGA ICO".split()
    if name in Image.OPEN
]
_TURNED, _START_OF_SCAN = (b"Exif\0\0", b"tiff:Orientation"), b"\xff\xda"


class BadImage(Exception):
    """A picture that cannot be used; the message says why in a few words."""


def decode(data: bytes, resize: int = 0) -> np.ndarray:
    """The first frame of a picture, upright, in colour: (height, width, 3) uint8.

    JPEG goes through simplejpeg, which is faster and gives Pillow's very bits; whatever that refuses,
    and everything else, goes through Pillow, which has the last word.

    Args:
        data: the bytes of the file.
        resize: what the shorter side will be resized to; a large JPEG then comes at a fraction of its
            size, at least twice that. 0: whole.

    Raises:
        BadImage: empty, truncated, corrupt, too large, or of a format that is no picture.
    """
    if not data:
        raise BadImage("is empty")
    pixels = _plain_jpeg(data, resize) if data[:2] == b"\xff\xd8" else None
    return _any_picture(data) if pixels is None else pixels


def prepared(pixels: np.ndarray, resize: int, channels: int) -> np.ndarray:
    """``pixels`` (H, W, 3) with shorter side ``resize`` (0: as it is), in 1 or 3 ``channels``.

    The resized picture is the antialiased one, computed in uint8.

    Raises:
        BadImage: so narrow that enlarging it would fill the memory.
    """
    height, width = pixels.shape[:2]
    if resize and resize != min(height, width):
        scale = resize / min(height, width)
        if scale > 1 and max(height, width) > _MAX_ENLARGED_ASPECT * min(height, width):
            raise BadImage(f"of {height}×{width} pixels is too narrow to be enlarged")
        size = [max(resize, round(side * scale)) for side in (height, width)]
        picture = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3, H, W)
        picture = F.interpolate(picture, size, mode="bilinear", antialias=True)
        pixels = picture[0].permute(1, 2, 0).numpy()
    if channels == 1:
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[..., None]
    return pixels


def required(module: str, purpose: str) -> ModuleType:
    """A package that only some sources need.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(
            f"{purpose} needs the package {package}; pip install -c constraints.txt {package}"
        ) from error


def _plain_jpeg(data: bytes, resize: int) -> np.ndarray | None:
    """A well-formed, upright JPEG in grey or colour; None for any other, CMYK among them."""
    simplejpeg = required("simplejpeg", "reading JPEG files")
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS or _is_turned(data):
            return None
        least = _REDUNDANCY * resize
        factor = next((f for f in _FACTORS if least and min(height, width) >= f * least), 1)
        if factor == 1:
            return simplejpeg.decode_jpeg(data)
        # The smallest fraction that gives so much is the one that is meant.
        size = {"min_height": -(-height // factor), "min_width": -(-width // factor)}
        return simplejpeg.decode_jpeg(data, **size, min_factor=1)
    except Exception:  # whatever it is, Pillow's verdict on the same bytes is the one that counts
        return None


def _is_turned(data: bytes) -> bool:
    # Before the pixels: through those, the search would take a twentieth of the whole decoding.
    end = data.find(_START_OF_SCAN)
    if all(data.find(mark, 0, end) < 0 for mark in _TURNED):
        return False
    with Image.open(io.BytesIO(data)) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def _any_picture(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"has {image.width}×{image.height} pixels, more than {MAX_PIXELS}")
            return np.array(_eight_bits(ImageOps.exif_transpose(image)).convert("RGB"))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise BadImage("is no picture of a known format") from error
    except Exception as error:  # decoders of broken files raise nearly anything
        raise BadImage(f"cannot be decoded: {error or type(error).__name__}") from error


def _eight_bits(image: Any) -> Any:
    """16-bit grey as its upper byte, where Pillow's own conversion would clip it to white."""
    if image.mode == "F":
        raise BadImage("has floating-point pixels, of no known range")
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
