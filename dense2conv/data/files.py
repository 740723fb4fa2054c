"""Which files a set is made of, and which of them are held out."""

from __future__ import annotations

import glob
import os
import re
from collections import defaultdict

from dense2conv.shapes import InputError

PIPE = "pipe:"
_TRAIN, _HELD_OUT = ("train",), ("val", "test", "dev")
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def train_and_held_out(
    root: str, held_out_root: str | None, suffix: str
) -> tuple[list[str], list[str]]:
    """The files of a set, and of its held-out part; the latter is empty where none is named.

    In a folder these are the files called train… and val…, test… or dev…; if none is called train…, all
    that are not held out.

    Raises:
        InputError: there are none.
    """
    files = expanded(root, suffix)
    if held_out_root:
        held_out = expanded(held_out_root, suffix)
    else:
        held_out = [file for file in files if _starts(file, _HELD_OUT)]
    train = [file for file in files if _starts(file, _TRAIN)]
    train = train or [file for file in files if file not in set(held_out)]
    if not train:
        raise InputError(
            f"data.root={root} holds no *{suffix} but held-out ones; give one with training images"
        )
    return train, held_out


def expanded(root: str, suffix: str) -> list[str]:
    """The files that a folder holds, or that a pattern such as train-{000..146}.tar names.

    Gaps in a folder's numbering are named as well, so that a missing file is noticed.

    Raises:
        InputError: the folder is missing or empty.
    """
    if root.startswith(PIPE) or _BRACES.search(root) or root.endswith(suffix):
        return [
            name if name.startswith(PIPE) else os.path.expanduser(name) for name in _braces(root)
        ]
    folder = os.path.expanduser(root)
    if not os.path.isdir(folder):
        raise InputError(
            f"data.root={root} is neither a folder nor a pattern of *{suffix}; "
            f"give one, such as PATH/train-{{000..146}}{suffix}"
        )
    files = glob.glob(os.path.join(glob.escape(folder), "**", f"*{suffix}"), recursive=True)
    if not files:
        raise InputError(f"data.root={root} holds no *{suffix}; give a folder that does")
    return sorted([*files, *_gaps(files)])


def _braces(pattern: str) -> list[str]:
    """A shell's brace expansion: {000..146} with its leading zeros, {a,b}."""
    found = _BRACES.search(pattern)
    if not found:
        return [pattern]
    first, last, words = found.groups()
    if words is not None:
        choices = words.split(",")
    else:
        choices = [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [name for choice in choices for name in _braces(before + choice + after)]


def _gaps(files: list[str]) -> list[str]:
    """Names that are missing in series such as train-00.tar, train-02.tar."""
    series = defaultdict(set)
    for file in files:
        folder, name = os.path.split(file)
        number = re.search(r"\d+", name)
        if number:
            key = (folder, name[: number.start()], len(number[0]), name[number.end() :])
            series[key].add(int(number[0]))
    return [
        os.path.join(folder, f"{before}{i:0{width}}{after}")
        for (folder, before, width, after), numbers in series.items()
        for i in range(min(numbers), max(numbers))
        if i not in numbers
    ]


def _starts(file: str, words: tuple[str, ...]) -> bool:
    return os.path.basename(file).lower().startswith(words)
