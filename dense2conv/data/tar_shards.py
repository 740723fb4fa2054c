"""WebDataset shards: tar archives of KEY.jpg beside KEY.cls, read at any place."""

from __future__ import annotations

import json
import os
import posixpath
import subprocess
from collections.abc import Iterator
from itertools import groupby
from typing import BinaryIO, NamedTuple

from dense2conv.data.config import DataConfig
from dense2conv.data.decode import BadImage
from dense2conv.data.encoded import (
    IMAGE_SUFFIXES,
    MAX_CLASSES,
    NO_LABEL,
    EncodedImages,
    every_eighth_held_out,
    file_state,
    fingerprint_of,
)
from dense2conv.data.files import PIPE, train_and_held_out
from dense2conv.data.skips import Skips
from dense2conv.data.tar_index import BadArchive, Bytes, members
from dense2conv.shapes import InputError

_LABEL_SUFFIX = ".cls"
_CLASSES_FILE = "classes.json"  # names of the labels, beside the shards


class _Slices:
    """An open file's bytes. Read rather than mapped: a map of a file that is cut short ends the process."""

    def __init__(self, file: BinaryIO) -> None:
        self._descriptor = file.fileno()
        self._size = os.fstat(self._descriptor).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, where: slice) -> bytes:
        return os.pread(self._descriptor, where.stop - where.start, where.start)


class _Shard(NamedTuple):
    """A file, or what a pipe gave, held in memory."""

    url: str
    content: bytes | None

    def read(self, start: int, stop: int) -> bytes:
        if self.content is not None:
            return self.content[start:stop]
        # Opened for each read: thousands of shards are too many to keep open.
        with open(self.url, "rb") as file:
            return _Slices(file)[start:stop]


class _Sample(NamedTuple):
    shard: int
    key: str
    start: int
    size: int
    label: int
    problem: str


class TarShards:
    """The images of tar shards, in the order of the shards.

    Members that share the name up to its last folder's first dot are one sample: a picture, and maybe
    its label as digits in ``.cls``. A label that is none, or beyond ``classes``, makes a bad image.
    A shard that is missing or damaged counts as bad among the shards; what lies before the damage is used.

    Args:
        urls: files, or ``pipe:COMMAND`` whose output is read into memory.
        config: ``on_error`` and ``max_bad_share``.
        classes: names of the labels, if they are known; otherwise the labels' own digits.

    Raises:
        InputError: too many bad shards, or no images in them.
    """

    def __init__(
        self, urls: list[str], config: DataConfig, classes: tuple[str, ...] | None = None
    ) -> None:
        skips = Skips(config, len(urls), "shards")
        self._shards: list[_Shard] = []
        self._samples: list[_Sample] = []
        for number, url in enumerate(urls):
            self._shards.append(_Shard(url, None))
            try:
                if url.startswith(PIPE):
                    self._shards[number] = _Shard(url, _run(url))
                for sample in _index(self._shards[number], number):
                    self._samples.append(sample)  # one by one, so that damage loses none before it
            except BadArchive as error:
                skips.bad(url, str(error))
            else:
                skips.good()
        if not self._samples:
            raise InputError(
                f"the shards {urls[0]} … hold no images ({', '.join(sorted(IMAGE_SUFFIXES))})"
            )
        if classes is None:
            largest = max(sample.label for sample in self._samples)
            classes = tuple(str(label) for label in range(largest + 1))
        self.classes = classes

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int) -> bytes:
        sample = self._samples[index]
        if sample.problem:
            raise BadImage(sample.problem)
        if sample.label >= len(self.classes):
            raise BadImage(f"has label {sample.label}, but there are {len(self.classes)} classes")
        return self._shards[sample.shard].read(sample.start, sample.start + sample.size)

    def label(self, index: int) -> int:
        return self._samples[index].label

    def name(self, index: int) -> str:
        sample = self._samples[index]
        return f"{self._shards[sample.shard].url}:{sample.key}"

    def place(self, index: int) -> str:
        return self._shards[self._samples[index].shard].url

    def fingerprint(self) -> str:
        return fingerprint_of(
            file_state(shard.url)
            if shard.content is None and os.path.exists(shard.url)
            else f"{shard.url} {len(shard.content or b'')}"
            for shard in self._shards
        )


def open_tar_shards(config: DataConfig) -> tuple[EncodedImages, EncodedImages]:
    """(training, held-out) images of the shards that ``config`` names."""
    root = config.root or ""
    train_urls, held_out_urls = train_and_held_out(root, config.held_out_root, ".tar")
    train = TarShards(train_urls, config, _class_names(root))
    if not held_out_urls:
        return every_eighth_held_out(train)
    return train, TarShards(held_out_urls, config, train.classes)


def _class_names(root: str) -> tuple[str, ...] | None:
    path = os.path.join(os.path.expanduser(root), _CLASSES_FILE)
    if not os.path.isfile(path):
        return None
    with open(path) as file:
        try:
            names = json.load(file)
        except ValueError as error:
            raise InputError(f"{path} is no JSON: {error}; mend it or take it away") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path} is no list of class names; mend it or take it away")
    return tuple(names)


def _run(url: str) -> bytes:
    """What a pipe's command prints: all of it, since batches are read in any order."""
    done = subprocess.run(url.removeprefix(PIPE), shell=True, capture_output=True)
    if done.returncode:
        raise BadArchive(
            f"ended with code {done.returncode}: {done.stderr.decode(errors='replace').strip()}"
        )
    return done.stdout


def _index(shard: _Shard, number: int) -> Iterator[_Sample]:
    """The samples of one shard; those before any damage come first."""
    if shard.content is not None:
        yield from _samples(shard.content, number)
        return
    try:
        with open(shard.url, "rb") as file:
            archive = _Slices(file)
            if not len(archive):
                raise BadArchive("is empty")
            yield from _samples(archive, number)
    except OSError as error:
        raise BadArchive(f"cannot be read: {error.strerror}") from error


def _samples(archive: Bytes, number: int) -> Iterator[_Sample]:
    for key, group in groupby(members(archive), lambda member: _key(member.name)):
        picture, label, problem = None, NO_LABEL, ""
        for member in group:
            suffix = posixpath.splitext(member.name)[1].lower()
            if suffix in IMAGE_SUFFIXES and picture is None:
                picture = member
            elif suffix == _LABEL_SUFFIX:
                digits = archive[member.start : member.start + member.size].strip()
                if digits.isdigit() and len(digits) < len(str(MAX_CLASSES)):
                    label = int(digits)
                else:
                    problem = f"has label {digits[:20]!r}, which is no number of a class"
        if picture is not None:
            yield _Sample(number, key, picture.start, picture.size, label, problem)


def _key(name: str) -> str:
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])
