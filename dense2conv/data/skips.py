"""Bad images are skipped, counted and named, until they are more than a set share."""

from __future__ import annotations

import logging
import threading
from typing import NamedTuple, Protocol

import numpy as np

from dense2conv.data.config import DataConfig
from dense2conv.data.decode import BadImage
from dense2conv.shapes import InputError

log = logging.getLogger(__name__)
_JUDGED_ON = 1000  # a share is judged on this many reads at least, or on the whole set


class Skips:
    """The policy of ``data.on_error`` and ``data.max_bad_share`` for one set of things."""

    def __init__(self, config: DataConfig, total: int, things: str = "images") -> None:
        self._config, self._total, self._things = config, total, things
        self._lock = threading.Lock()
        self._num_good = 0
        self.reasons: dict[str, str] = {}

    def good(self) -> None:
        """One was read, and is usable."""
        with self._lock:
            self._num_good += 1

    def bad(self, name: str, reason: str) -> None:
        """One is not usable.

        Raises:
            InputError: none may be skipped, or too many were.
        """
        if self._config.on_error == "fail":
            raise InputError(
                f"{name} {reason}; mend it or take it away, or set data.on_error=skip to go on without it"
            )
        with self._lock:
            if name in self.reasons:
                return
            self.reasons[name] = reason
            num_bad = len(self.reasons)
            of = max(self._num_good + num_bad, min(self._total, _JUDGED_ON))
        log.warning("skipped %s: %s (%d bad %s so far)", name, reason, num_bad, self._things)
        if num_bad > self._config.max_bad_share * of:
            raise InputError(
                f"{num_bad} of {of} {self._things} are bad, more than data.max_bad_share="
                f"{self._config.max_bad_share}; the last one: {name} {reason}; mend the set, or raise it"
            )


class Pictures(Protocol):
    """Decoded images by index, from files or from a cache."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def pixels(self, index: int) -> np.ndarray:
        """(height, width, channels) uint8, or BadImage."""

    def label(self, index: int) -> int:
        """Its label, or NO_LABEL."""

    def name(self, index: int) -> str:
        """What a log calls it."""

    def fingerprint(self) -> str:
        """Changes with the files behind it, and with how they are decoded."""


class Picture(NamedTuple):
    """One usable image: (height, width, channels) uint8, at least as large as asked for."""

    pixels: np.ndarray
    label: int


class UsablePictures:
    """Pictures of at least ``side`` pixels; in place of a bad one, the next good one.

    The stand-in depends on nothing but the set, so all meshes, and a run that is resumed, agree on it.
    """

    def __init__(self, pictures: Pictures, config: DataConfig) -> None:
        self._pictures, self._side = pictures, config.side
        self.name, self.label = pictures.name, pictures.label
        self._skips = Skips(config, len(pictures))

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Picture:
        for step in range(len(self)):
            place = (index + step) % len(self)
            name = self._pictures.name(place)
            if name in self._skips.reasons:
                continue
            try:
                pixels = self._pictures.pixels(place)
                if min(pixels.shape[:2]) < self._side:
                    height, width = pixels.shape[:2]
                    raise BadImage(
                        f"of {height}×{width} pixels is under data.side={self._side}; data.resize enlarges"
                    )
            except BadImage as error:
                self._skips.bad(name, str(error))
                continue
            self._skips.good()
            return Picture(pixels, self._pictures.label(place))
        raise InputError(f"none of {len(self)} images is usable; look at the log for the reasons")
