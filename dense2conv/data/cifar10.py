"""CIFAR-10's binary version, or tar shards of it."""

from __future__ import annotations

import os

import numpy as np

from dense2conv.data.config import DataConfig
from dense2conv.data.encoded import EncodedImages, file_state, fingerprint_of
from dense2conv.data.tar_shards import open_tar_shards
from dense2conv.shapes import InputError

_SIDE, _CHANNELS = 32, 3
_RECORD = 1 + _CHANNELS * _SIDE**2  # a label, then the red, green and blue planes
_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
_HEADER = f"P6 {_SIDE} {_SIDE} 255\n".encode()  # a PPM picture is this and the pixels


class Cifar10:
    """The records of CIFAR-10's binary files. (Krizhevsky, 2009)

    Raises:
        InputError: a file is missing, or holds anything but whole records.
    """

    classes = tuple(_CLASSES)

    def __init__(self, folder: str, files: list[str]) -> None:
        self._paths = [os.path.join(folder, file) for file in files]
        for path in self._paths:
            if not os.path.isfile(path):
                raise InputError(f"{path} is missing; unpack the whole of cifar-10-binary.tar.gz")
            size = os.path.getsize(path)
            if size == 0 or size % _RECORD:
                raise InputError(
                    f"{path} has {size} bytes, which are no whole records of {_RECORD}; unpack it again"
                )
        # Held in memory, 180 MB: a memory map ends the process if a file is cut short under it.
        self._records = np.concatenate([np.fromfile(path, np.uint8) for path in self._paths])

    def __len__(self) -> int:
        return len(self._records) // _RECORD

    def read(self, index: int) -> bytes:
        planes = self._record(index)[1:].reshape(_CHANNELS, _SIDE, _SIDE)
        return _HEADER + planes.transpose(1, 2, 0).tobytes()

    def label(self, index: int) -> int:
        return int(self._record(index)[0])

    def name(self, index: int) -> str:
        return f"CIFAR-10 image {index}"

    def place(self, index: int) -> str:
        return self._paths[0]

    def fingerprint(self) -> str:
        return fingerprint_of(map(file_state, self._paths))

    def _record(self, index: int) -> np.ndarray:
        return self._records[index * _RECORD : (index + 1) * _RECORD]


def open_cifar10(config: DataConfig) -> tuple[EncodedImages, EncodedImages]:
    """(training, test) images of the folder ``data.root``."""
    root = os.path.expanduser(config.root or "")
    for folder in (root, os.path.join(root, "cifar-10-batches-bin")):
        if os.path.exists(os.path.join(folder, "test_batch.bin")):
            train = [f"data_batch_{i}.bin" for i in range(1, 6)]
            return Cifar10(folder, train), Cifar10(folder, ["test_batch.bin"])
    for folder in (root, os.path.join(root, "cifar-10-batches-py")):
        if os.path.exists(os.path.join(folder, "test_batch")):
            raise InputError(
                f"{folder} holds the pickled version of CIFAR-10, which would have to be unpickled; "
                "use the binary version, cifar-10-binary.tar.gz"
            )
    return open_tar_shards(config)
