"""ImageNet's layout: one folder a class, in train/ and val/."""

from __future__ import annotations

import logging
import os

from dense2conv.data.encoded import (
    IMAGE_SUFFIXES,
    NO_LABEL,
    EncodedImages,
    every_eighth_held_out,
    file_state,
    fingerprint_of,
)
from dense2conv.shapes import InputError

log = logging.getLogger(__name__)


class ClassFolders:
    """The images under ``root``/<class>/, in the order of their paths.

    Args:
        root: folder of class folders.
        classes: names of the labels; by default the folders' own, sorted. Images of another class are
            used without a label, and a warning names one.

    Raises:
        InputError: no folders, no images, or images outside class folders.
    """

    def __init__(self, root: str, classes: tuple[str, ...] | None = None) -> None:
        self._root = root
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
        folders = [entry.name for entry in entries if entry.is_dir()]
        loose = [entry.name for entry in entries if not entry.is_dir() and _is_image(entry.name)]
        if loose or not folders:
            what = f"{len(loose)} images outside class folders, such as {loose[0]}" if loose else ""
            raise InputError(
                f"{root} holds {what or 'no class folders'}; data=imagenet wants CLASS/IMAGE in it "
                "(data=folder takes images of no class)"
            )
        self.classes = tuple(folders) if classes is None else classes
        label_of = {name: label for label, name in enumerate(self.classes)}
        unknown = [name for name in folders if name not in label_of]
        if unknown:
            log.warning(
                "%s: %d of %d classes are not trained on, such as %s; their images have no label",
                *(root, len(unknown), len(folders), unknown[0]),
            )
        self._names: list[str] = []
        self._labels: list[int] = []
        for folder in folders:
            names = _images_under(root, folder)
            self._names += names
            self._labels += [label_of.get(folder, NO_LABEL)] * len(names)
        if not self._names:
            raise InputError(f"{root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        with open(self.name(index), "rb") as file:
            return file.read()

    def label(self, index: int) -> int:
        return self._labels[index]

    def name(self, index: int) -> str:
        return os.path.join(self._root, self._names[index])

    def place(self, index: int) -> str:
        return self._root

    def fingerprint(self) -> str:
        states = (file_state(self.name(i)) for i in range(len(self)))
        return fingerprint_of(
            part for pair in zip(self._names, states, strict=True) for part in pair
        )


def open_class_folders(root: str, held_out_root: str | None) -> tuple[EncodedImages, EncodedImages]:
    """(training, held-out) images of ``root``/train and ``root``/val, or of ``root`` itself."""
    root = os.path.expanduser(root)
    if not os.path.isdir(root):
        raise InputError(f"data.root={root} is not a folder; give one with train/CLASS/IMAGE in it")
    inner = os.path.join(root, "train")
    train = ClassFolders(inner if os.path.isdir(inner) else root)
    held_out = held_out_root or os.path.join(root, "val")
    if held_out_root and not os.path.isdir(os.path.expanduser(held_out_root)):
        raise InputError(f"data.held_out_root={held_out_root} is not a folder; give one, or null")
    if not os.path.isdir(os.path.expanduser(held_out)):
        return every_eighth_held_out(train)
    return train, ClassFolders(os.path.expanduser(held_out), train.classes)


def _images_under(root: str, folder: str) -> list[str]:
    return sorted(
        os.path.relpath(os.path.join(where, name), root)
        for where, _, names in os.walk(os.path.join(root, folder), followlinks=True)
        for name in names
        if _is_image(name)
    )


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
