"""Decoded pixels in one memory-mapped file: built once, checked, and shared by all local processes.

A cache is a folder of

    pixels.bin      the images' bytes, one after another
    index.npy       (N, 4) int64: start, height, width (0 for a bad image) and CRC-32 of each
    manifest.json   what the cache is made of, and the reasons of the bad images; written last
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dense2conv.bar import Bar
from dense2conv.data.ahead import in_order
from dense2conv.data.config import DataConfig
from dense2conv.data.decode import BadImage
from dense2conv.data.skips import Pictures, Skips
from dense2conv.files import write_atomically
from dense2conv.shapes import InputError

log = logging.getLogger(__name__)
_FORMAT = 1
_PIXELS, _INDEX, _MANIFEST = "pixels.bin", "index.npy", "manifest.json"


def cached(pictures: Pictures, folder: Path, config: DataConfig, progress: bool) -> Pictures:
    """``pictures`` out of the cache in ``folder``, which is built first where there is none.

    Processes that come while it is built wait for it. A build that is killed leaves no cache.

    Raises:
        InputError: the cache is of other images or damaged, there is no room, or too many images are bad.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if not (folder / _MANIFEST).is_file():
            if folder.exists():
                raise InputError(f"{folder} is no cache; give another data.cache, or delete it")
            _build(pictures, folder, config, progress)
    return CachedPictures(pictures, folder)


class CachedPictures:
    """Pixels from the cache, names and labels from the set that it was made of.

    Each image's checksum is compared when it is first read.

    Raises:
        InputError: the cache is of other images, or damaged.
    """

    def __init__(self, pictures: Pictures, folder: Path) -> None:
        self.classes = pictures.classes
        self.label, self.name, self.fingerprint = (
            pictures.label,
            pictures.name,
            pictures.fingerprint,
        )
        self._folder = folder
        self._manifest = _manifest(folder)
        if self._manifest["of"] != pictures.fingerprint():
            raise InputError(
                f"{folder} was made of other files, or with another data.resize or data.channels; "
                "delete it to build it anew, or give another data.cache"
            )
        index_path, pixels_path = folder / _INDEX, folder / _PIXELS
        try:
            index = index_path.read_bytes()
            size = pixels_path.stat().st_size
        except OSError as error:
            raise self._damaged(error.strerror or "unreadable") from error
        if zlib.crc32(index) != self._manifest["index_crc"] or size != self._manifest["size"]:
            raise self._damaged("its files are not those that were written")
        self._index = np.load(index_path, allow_pickle=False)
        # An empty file cannot be mapped; then there is no image to read from it either.
        self._pixels = np.memmap(pixels_path, np.uint8, "r") if size else np.empty(0, np.uint8)
        self._checked = np.zeros(len(self._index), bool)

    def __len__(self) -> int:
        return len(self._index)

    def pixels(self, index: int) -> np.ndarray:
        """(height, width, channels) uint8, read-only; BadImage where the set's own was one."""
        start, height, width, checksum = self._index[index].tolist()
        if not height:
            raise BadImage(self._manifest["bad"][str(index)])
        pixels = self._pixels[start : start + height * width * self._manifest["channels"]]
        if not self._checked[index]:
            if zlib.crc32(pixels.data) != checksum:
                raise self._damaged(f"image {index} is not what was written")
            self._checked[index] = True
        return pixels.reshape(height, width, -1)

    def _damaged(self, how: str) -> InputError:
        return InputError(
            f"the cache {self._folder} is damaged ({how}); delete it to build it anew"
        )


def _build(pictures: Pictures, folder: Path, config: DataConfig, progress: bool) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed
    partial.mkdir()
    log.info("building the cache %s of %d images", folder, len(pictures))
    try:
        manifest = _write(pictures, partial, config, progress)
        write_atomically(partial / _MANIFEST, json.dumps(manifest))
        partial.rename(folder)
    except OSError as error:
        raise InputError(
            f"the cache {folder} cannot be written: {error.strerror}; make room, or give another data.cache"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(pictures: Pictures, folder: Path, config: DataConfig, progress: bool) -> dict[str, Any]:
    """Write the pixels and the index; returns the manifest."""
    skips = Skips(config, len(pictures))
    bad: dict[str, str] = {}
    rows = np.zeros((len(pictures), 4), np.int64)
    start = 0

    def decoded(index: int) -> np.ndarray | BadImage:
        try:
            return pictures.pixels(index)
        except BadImage as error:
            return error

    with (
        ThreadPoolExecutor(config.workers) as pool,
        (folder / _PIXELS).open("wb") as file,
        Bar(total=len(pictures), desc="caching", unit="image", disable=not progress) as bar,
    ):
        results = in_order(pool, decoded, range(len(pictures)), ahead=4 * config.workers)
        for index, result in enumerate(results):
            if isinstance(result, BadImage):
                bad[str(index)] = str(result)
                skips.bad(pictures.name(index), str(result))
            else:
                skips.good()
                content = np.ascontiguousarray(result)
                rows[index] = start, *content.shape[:2], zlib.crc32(content.data)
                start += file.write(content.data)
            bar.update()
        file.flush()
        os.fsync(file.fileno())
    np.save(folder / _INDEX, rows, allow_pickle=False)
    return {
        "format": _FORMAT,
        "of": pictures.fingerprint(),
        "channels": config.channels,
        "size": start,
        "index_crc": zlib.crc32((folder / _INDEX).read_bytes()),
        "bad": bad,
    }


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if manifest["format"] == _FORMAT and {"of", "channels", "size", "index_crc", "bad"} <= set(
            manifest
        ):
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{folder / _MANIFEST} is damaged, or of another version; delete {folder}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the kernel frees the lock when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
