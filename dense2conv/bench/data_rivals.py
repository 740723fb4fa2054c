"""How others make a batch of small pictures out of JPEG files: (n, 3, side, side) uint8.

Each resizes the shorter side to ``resize``, antialiased, and cuts a square out at a random place.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dense2conv.data.decode import required

_FRACTIONS = (8, 4, 2)  # of a JPEG's size that OpenCV decodes at


@dataclass(frozen=True)
class Task:
    """What is asked of a rival: pictures of ``side`` pixels, out of ones resized to ``resize``."""

    paths: Sequence[Path]
    side: int
    resize: int
    batch: int
    scratch: Path
    random: np.random.Generator

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width when resized."""
        scale = self.resize / min(height, width)
        return max(self.resize, round(height * scale)), max(self.resize, round(width * scale))

    def crop(self, pixels: np.ndarray) -> Tensor:
        """A random square of (H, W, 3), channels first."""
        top, left = (self.random.integers(n - self.side + 1) for n in pixels.shape[:2])
        square = pixels[top : top + self.side, left : left + self.side]
        return torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1)))

    def batches(self) -> Iterator[list[Path]]:
        """Files of batch after batch, for ever, in random order."""
        while True:
            picked = self.random.integers(len(self.paths), size=self.batch)
            yield [self.paths[i] for i in picked]


Loader = Callable[[], Tensor]
Decode = Callable[[Task, bytes], np.ndarray]


def pillow(task: Task, data: bytes, draft: int = 0) -> np.ndarray:
    """Decoded whole; or at the smallest ½, ¼ or ⅛ that is ``draft`` times as large as asked for."""
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        height, width = task.target(height, width)
        if draft:
            image.draft("RGB", (draft * width, draft * height))
        picture = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture)


_draft = partial(pillow, draft=1)


def _opencv(task: Task, data: bytes) -> np.ndarray:
    """At a fraction of its size that is at least twice as large as asked for, then by areas."""
    cv2 = required("cv2", "the OpenCV rival")
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
    least = 2 * task.resize
    fraction = next((f for f in _FRACTIONS if min(height, width) >= f * least), 1)
    flag = getattr(cv2, f"IMREAD_REDUCED_COLOR_{fraction}") if fraction > 1 else cv2.IMREAD_COLOR
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    height, width = task.target(height, width)
    pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))


def one_by_one(decode: Decode, task: Task) -> Loader:
    """A batch in a loop."""
    batches = task.batches()

    def load() -> Tensor:
        pictures = [decode(task, path.read_bytes()) for path in next(batches)]
        return torch.stack([task.crop(picture) for picture in pictures])

    return load


class _Files(Dataset[Tensor]):
    def __init__(self, task: Task) -> None:
        self._task = task

    def __len__(self) -> int:
        return len(self._task.paths)

    def __getitem__(self, index: int) -> Tensor:
        data = self._task.paths[index].read_bytes()
        return self._task.crop(_draft(self._task, data))


def _data_loader(task: Task) -> Loader:
    """Torch's DataLoader in this process, so that a core's worth is measured."""
    sampler = torch.utils.data.RandomSampler(
        _Files(task),
        replacement=True,
        num_samples=1 << 30,
    )
    batches = iter(DataLoader(_Files(task), task.batch, sampler=sampler))
    return lambda: next(batches)


def _webdataset(task: Task) -> Loader:
    """Its tar reader, with Pillow's draft, as its own decoder takes twice the time."""
    wds = required("webdataset", "the webdataset rival")
    shard = task.scratch / f"shard-{task.side}.tar"
    with tarfile.open(shard, "w") as tar:
        for number, path in enumerate(task.paths):
            entry = tarfile.TarInfo(f"{number:06d}.jpg")
            entry.size = path.stat().st_size
            tar.addfile(entry, io.BytesIO(path.read_bytes()))
    samples = wds.WebDataset(str(shard), shardshuffle=False).repeat().to_tuple("jpg")
    pictures = samples.map(lambda sample: task.crop(_draft(task, sample[0])))
    batches = iter(wds.WebLoader(pictures, batch_size=task.batch))
    return lambda: next(batches)


@dataclass(frozen=True)
class Rival:
    """How a picture is decoded and resized, and how batches are made of them."""

    decode: Decode
    loader: Callable[[Task], Loader]

    @classmethod
    def in_a_loop(cls, decode: Decode) -> Rival:
        return cls(decode, partial(one_by_one, decode))


RIVALS = {
    "Pillow": Rival.in_a_loop(pillow),
    "Pillow, draft": Rival.in_a_loop(_draft),
    "Pillow, draft 2×": Rival.in_a_loop(partial(pillow, draft=2)),
    "DataLoader, Pillow draft": Rival(_draft, _data_loader),
    "webdataset, Pillow draft": Rival(_draft, _webdataset),
    "OpenCV, reduced": Rival.in_a_loop(_opencv),
}
