"""Sets of encoded images, by index: what folders, archives and tables have in common."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from dense2conv.data.decode import DECODING, BadImage, decode, prepared
from dense2conv.shapes import InputError

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .png .bmp .webp .tif .tiff .ppm .pgm .gif".split()  # what a set's files end in
)
NO_LABEL = -1
MAX_CLASSES = 1_000_000  # a larger label is no number of a class
_HELD_OUT_EVERY = 8  # of a set that says nothing of held-out images, every eighth is


class EncodedImages(Protocol):
    """Images as their files hold them. Indices, and so a run's batches, follow the sorted names."""

    classes: tuple[str, ...]
    """Names of the labels; empty where there are none."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The bytes of one picture. Raises OSError or BadImage where there are none to be had."""

    def label(self, index: int) -> int:
        """Its label, or NO_LABEL."""

    def name(self, index: int) -> str:
        """What a log calls it."""

    def place(self, index: int) -> str:
        """The folder or file with which it would be lost."""

    def fingerprint(self) -> str:
        """Changes when a file is added, removed, resized or written anew."""


class Selected:
    """Some images of a set."""

    def __init__(self, images: EncodedImages, indices: Sequence[int]) -> None:
        self.classes = images.classes
        self._images = images
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> bytes:
        return self._images.read(self._indices[index])

    def label(self, index: int) -> int:
        return self._images.label(self._indices[index])

    def name(self, index: int) -> str:
        return self._images.name(self._indices[index])

    def place(self, index: int) -> str:
        return self._images.place(self._indices[index])

    def fingerprint(self) -> str:
        return fingerprint_of([self._images.fingerprint(), str(list(self._indices))])


def every_eighth_held_out(images: EncodedImages) -> tuple[EncodedImages, EncodedImages]:
    """A set as (training, held-out) images, for one that does not say which are which."""
    held_out = np.arange(len(images)) % _HELD_OUT_EVERY == 0
    train, rest = np.flatnonzero(~held_out).tolist(), np.flatnonzero(held_out).tolist()
    return Selected(images, train), Selected(images, rest)


class DecodedImages:
    """A set's images as pixels, decoded when they are asked for."""

    def __init__(self, encoded: EncodedImages, resize: int, channels: int) -> None:
        self.classes = encoded.classes
        self.label, self.name = encoded.label, encoded.name
        self._encoded, self._resize, self._channels = encoded, resize, channels

    def __len__(self) -> int:
        return len(self._encoded)

    def pixels(self, index: int) -> np.ndarray:
        """(height, width, channels) uint8.

        Raises:
            BadImage: it cannot be read or decoded.
            InputError: the set is not there any more, which no other image stands in for.
        """
        try:
            data = self._encoded.read(index)
        except OSError as error:
            _require(self._encoded.place(index))
            raise BadImage(f"cannot be read: {error.strerror or error}") from error
        return prepared(decode(data, self._resize), self._resize, self._channels)

    def fingerprint(self) -> str:
        how = f"{self._resize} {self._channels} {DECODING}"
        return fingerprint_of([self._encoded.fingerprint(), how])


def _require(place: str) -> None:
    """Raise InputError for a folder or file that was there and is gone."""
    try:
        os.stat(place)
    except OSError as error:
        raise InputError(
            f"{place}, which holds images of this run, is gone ({error.strerror}); bring it back"
        ) from error


def fingerprint_of(parts: Iterable[str]) -> str:
    """One short name for a list of texts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()[:32]


def file_state(path: str) -> str:
    """Name, size and time of a file, for a fingerprint."""
    state = os.stat(path)
    return f"{os.path.basename(path)} {state.st_size} {state.st_mtime_ns}"
