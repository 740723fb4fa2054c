"""Photographs as uint8 arrays: those that ship inside scikit-image and scikit-learn, or a folder's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
import sklearn.datasets
from PIL import Image

from dense2conv.bar import Bar
from dense2conv.data.config import DataConfig
from dense2conv.data.decode import BadImage, decode
from dense2conv.data.encoded import IMAGE_SUFFIXES
from dense2conv.shapes import InputError

log = logging.getLogger(__name__)

# Real scenes only. The right view of the motorcycle shows the same scene as the left one and is
# left out, as are textures, text, diagrams and medical images. Grey scenes serve grey runs alone.
COLOUR_TRAIN = ("astronaut.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "china.jpg")
GREY_TRAIN = (*COLOUR_TRAIN, "coins.png")
COLOUR_HELD_OUT = ("chelsea.png", "flower.jpg")
GREY_HELD_OUT = (*COLOUR_HELD_OUT, "camera.png")

_HELD_OUT_EVERY = 8  # of a folder's images, every eighth is held out


@dataclass(frozen=True)
class Photographs:
    """Decoded training and held-out photographs, each (height, width, channels) uint8."""

    train: Sequence[np.ndarray]
    held_out: Sequence[np.ndarray]


def load_photographs(config: DataConfig, progress: bool = False) -> Photographs:
    """Decode the photographs that ``config`` names.

    Raises:
        InputError: the folder is missing, or holds too few readable images that are large enough.
    """
    if config.root and config.kind != "natural":
        return _folder(config, progress)
    train, held_out = (
        (GREY_TRAIN, GREY_HELD_OUT) if config.channels == 1 else (COLOUR_TRAIN, COLOUR_HELD_OUT)
    )
    photographs = Photographs(
        [_decode(_embedded(name), config) for name in train],
        [_decode(_embedded(name), config) for name in held_out],
    )
    smallest = min(min(p.shape[:2]) for p in (*photographs.train, *photographs.held_out))
    if smallest < config.side:
        raise InputError(
            f"data.side={config.side} is larger than the smallest embedded photograph "
            f"({smallest} pixels); use a smaller side, or your own images: data=folder data.root=PATH"
        )
    return photographs


def _embedded(name: str) -> Path:
    for folder in (
        Path(skimage.data.__file__).parent,
        Path(sklearn.datasets.__file__).parent / "images",
    ):
        if (folder / name).is_file():
            return folder / name
    raise InputError(
        f"the photograph {name} is not inside the installed scikit-image or scikit-learn; "
        "install the pinned versions: pip install -c constraints.txt dense2conv"
    )


def _decode(path: Path, config: DataConfig) -> np.ndarray:
    """One image, upright, grey or RGB, (height, width, channels) uint8.

    Raises:
        OSError, BadImage: it cannot be read, or is no picture.
    """
    picture = Image.fromarray(decode(path.read_bytes()))
    if config.channels == 1:
        picture = picture.convert("L")
    if config.resize:
        scale = config.resize / min(picture.size)
        width, height = (max(config.resize, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture).reshape(picture.height, picture.width, config.channels)


def _folder(config: DataConfig, progress: bool) -> Photographs:
    root = Path(config.root or "").expanduser()
    if not root.is_dir():
        raise InputError(f"data.root={config.root} is not a folder; give one that holds images")
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not paths:
        raise InputError(
            f"data.root={config.root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); "
            "give a folder of images"
        )
    if len(paths) > config.max_images:
        log.info("using %d of %d images (data.max_images)", config.max_images, len(paths))
        keep = np.linspace(0, len(paths) - 1, config.max_images).round().astype(int)
        paths = [paths[i] for i in keep]

    def read(path: Path) -> np.ndarray | None:
        try:
            picture = _decode(path, config)
        except OSError as error:
            log.warning("skipped %s: cannot be read: %s", path, error.strerror or error)
            return None
        except BadImage as error:
            log.warning("skipped %s: %s", path, error)
            return None
        if min(picture.shape[:2]) < config.side:
            log.warning("skipped %s: %d×%d is under data.side", path, *picture.shape[:2])
            return None
        return picture

    with ThreadPoolExecutor() as pool:
        decoded = list(
            Bar(
                pool.map(read, paths),
                total=len(paths),
                desc="decoding",
                unit="image",
                disable=None if progress else True,
                leave=False,
            )
        )
    usable = [picture for picture in decoded if picture is not None]
    if len(usable) < 2:
        raise InputError(
            f"data.root={config.root}: {len(usable)} of {len(paths)} images are readable and at least "
            f"data.side={config.side} pixels; two are needed (one is held out): "
            "lower data.side, or add images"
        )
    held_out = usable[::_HELD_OUT_EVERY]
    train = [p for i, p in enumerate(usable) if i % _HELD_OUT_EVERY]
    return Photographs(train, held_out)
