"""``dense2conv bench data``: images a second and core, from JPEG files to the device's tensor."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dense2conv.bench.data_rivals import RIVALS, Decode, Loader, Task
from dense2conv.bench.timing import Ratio, Work, aligned, interleaved, machine, plain
from dense2conv.data import DataConfig, open_source
from dense2conv.data.decode import decode, prepared
from dense2conv.data.photographs import load_photographs
from dense2conv.files import write_atomically
from dense2conv.parallel import Mesh, ParallelConfig
from dense2conv.planner import PlanConfig
from dense2conv.shapes import InputError
from dense2conv.training.run_folder import RunConfig, RunFolder

_MARGIN = 8 / 7  # of the resized picture's shorter side over the crop's
_COMPARED = 64  # pictures whose pixels are compared
_QUALITY, _SHORTER_SIDE = 92, 375  # of the photographs at hand, made like ImageNet's


def _run() -> RunConfig:
    return RunConfig(name="bench-data", existing="keep_aside")


def _images() -> DataConfig:
    return DataConfig(kind="imagenet", channels=3, flip=True, workers=1, prefetch=0)


@dataclass
class DataBench:
    """What ``dense2conv bench data`` measures."""

    run: RunConfig = field(default_factory=_run)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=_images)
    sides: list[int] = field(
        default_factory=lambda: [32, 64, 224],
        metadata={"help": "sides of the crops; pictures are resized to 8/7 of it before"},
    )
    batch: int = field(default=256, metadata={"help": "images that are loaded at once"})
    pairs: int = field(default=15, metadata={"help": "rounds in which all candidates take turns"})
    seconds: float = field(
        default=120.0, metadata={"help": "stop a side's rounds then, though not before three"}
    )
    threads: int = field(default=1, metadata={"help": "threads of torch"})
    plan: str | None = field(
        default=None,
        metadata={"help": "what has to be delivered: a file of dense2conv plan … json=true"},
    )
    seed: int = field(default=0, metadata={"help": "of the order and the places"})

    def validate(self) -> None:
        """Raise InputError where a field cannot be."""
        self.run.validate()
        self.parallel.validate_device()
        if self.parallel.world_size > 1:
            raise InputError(
                f"parallel={self.parallel.name}: this benchmark measures one core; use one process"
            )
        if not self.sides or min(self.sides) < 2:
            raise InputError(f"sides={self.sides}; give sides of 2 pixels or more, e.g. [32,64]")
        if self.batch < 1:
            raise InputError(f"batch={self.batch}; use 1 or more")
        if self.pairs < 3:
            raise InputError(f"pairs={self.pairs}; use 3 or more, 15 for an interval")


def bench_data(config: DataBench, mesh: Mesh) -> None:
    """Measure, print one table, and write it to ``result.json`` in the run's folder."""
    torch.set_num_threads(config.threads)
    needed = _needed(config.plan)
    folder = RunFolder(config.run.folder)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    with _jpeg_files(config.data) as root, tempfile.TemporaryDirectory() as scratch:
        for side in tqdm(config.sides, desc="bench", unit="side", disable=None, leave=False):
            rows += _side(config, root, side, Path(scratch), mesh.device, left_out)
    folder.create(config.run, resume=False)
    about = machine(mesh.device) | {"images": str(config.data.root or "scikit-image, scikit-learn")}
    result = {
        "benchmark": "data",
        "machine": about,
        "rows": [{key: plain(value) for key, value in row.items()} for row in rows],
        "left_out": left_out,
        "planned_images_per_core": {
            side: PlanConfig().cluster.images_per_core_at(side) for side in config.sides
        },
        "needed_images_per_second": needed,
    }
    path = folder.path / "result.json"
    write_atomically(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(_table(rows, about, left_out, needed))
    print(path)


def _side(
    config: DataBench,
    root: Path,
    side: int,
    scratch: Path,
    device: torch.device,
    left_out: dict[str, str],
) -> list[dict[str, Any]]:
    """A row for each candidate at one side."""
    resize = round(side * _MARGIN)
    data = DataConfig(**{**vars(config.data), "root": str(root), "side": side, "resize": resize})
    data.statistics_samples = min(data.statistics_samples, config.batch)
    source = open_source(data, config.seed)
    step = iter(range(1 << 62))

    def ours() -> Tensor:
        return source.read(next(step), config.batch, range(config.batch)).pixels

    random = np.random.default_rng(config.seed)
    paths = sorted(root.glob("train/*/*"))
    task = Task(paths, side, resize, config.batch, scratch, random)
    loaders: dict[str, Loader] = {"ours": ours}
    decibels = {
        "ours": _decibels(task, lambda task, data: prepared(decode(data, resize), resize, 3))
    }
    for name, rival in RIVALS.items():
        try:
            decibels[name] = _decibels(task, rival.decode)
            loaders[name] = rival.loader(task)
        except InputError as error:
            left_out[name] = str(error)

    def to_device(load: Loader) -> Work:
        def work() -> Tensor:
            return source.standardise(load().flatten(1).to(device))

        return work

    works = {name: to_device(load) for name, load in loaders.items()}
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = interleaved(works, config.pairs, config.seconds, synchronise)
    return [
        {
            "side": side,
            "resize": resize,
            "candidate": name,
            "images_per_second": config.batch / median(times[name]),
            "ratio": Ratio.of(times[name], times["ours"]),
            "decibels": decibels[name],
        }
        for name in works
    ]


def _decibels(task: Task, decoded: Decode) -> float:
    """Median PSNR of resized pictures, beside those that are decoded whole and resized by torch."""
    values = []
    for path in task.paths[:_COMPARED]:
        data = path.read_bytes()
        whole = prepared(decode(data), task.resize, 3).astype(np.float64)
        found = decoded(task, data)
        height, width = map(min, whole.shape[:2], found.shape[:2])
        error = np.square(whole[:height, :width] - found[:height, :width]).mean()
        values.append(10 * np.log10(255**2 / error) if error else np.inf)
    return float(np.median(values))


@contextmanager
def _jpeg_files(config: DataConfig) -> Iterator[Path]:
    """A folder with train/CLASS/IMAGE: the user's own, or the photographs at hand made into one."""
    if config.root:
        root = Path(config.root).expanduser()
        if not any(root.glob("train/*/*")):
            raise InputError(
                f"data.root={config.root} holds no train/CLASS/IMAGE; give one that does"
            )
        yield root
        return
    photographs = load_photographs(DataConfig(channels=3, resize=_SHORTER_SIDE))
    with tempfile.TemporaryDirectory() as folder:
        for part in ("train", "val"):
            (Path(folder) / part / "all").mkdir(parents=True)
            pictures = [*photographs.train, *photographs.held_out]
            for number, pixels in enumerate(pictures):
                path = Path(folder) / part / "all" / f"{number}.jpg"
                Image.fromarray(pixels).save(path, quality=_QUALITY)
        yield Path(folder)


def _needed(plan: str | None) -> float | None:
    """Images a second that a plan's best mesh takes."""
    if plan is None:
        return None
    try:
        return float(json.loads(Path(plan).read_text())["best"]["images_per_second"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"plan={plan} is no plan ({error!r}); write one with dense2conv plan … json=true > {plan}"
        ) from error


def _table(
    rows: list[dict[str, Any]],
    about: dict[str, Any],
    left_out: dict[str, str],
    needed: float | None,
) -> str:
    """The rows as text, a ratio with its 95 % interval."""
    lines = [["side", "from", "", "images/s and core", "time over ours", "dB"]]
    for row in rows:
        shown = [str(row["side"]), str(row["resize"]), row["candidate"]]
        figures = [f"{row['images_per_second']:.0f}", str(row["ratio"]), f"{row['decibels']:.1f}"]
        lines.append([*shown, *figures])
    text = aligned(lines)
    text += ["", "dB: median PSNR to the picture that is decoded whole, then resized by torch"]
    text += [f"without {name}: {reason}" for name, reason in left_out.items()]
    ours = {row["side"]: row["images_per_second"] for row in rows if row["candidate"] == "ours"}
    planned = PlanConfig().cluster.images_per_core_at
    counted = ", ".join(f"{planned(side):.0f} at {side}" for side in ours)
    text.append(f"dense2conv plan counts on {counted} images/s and core")
    if needed is not None:
        cores = ", ".join(f"{needed / rate:.1f} cores at {side}" for side, rate in ours.items())
        text.append(f"the plan takes {needed:.0f} images/s: {cores}")
    text.append(
        f"{about['images']}; {about['threads']} thread(s), {about['device']}, {about['processor']}, "
        f"torch {about['torch']}"
    )
    return "\n".join(text)
