"""What a run left on disk, read without trusting it: a part that is missing or broken is empty.

Axis legend: n units of a sample, D inputs of a layer, K kernels, C channels, k kernel side.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dense2conv.data.source import permuted
from dense2conv.shapes import Geometry, ImageShape, InputError

Array = NDArray[Any]


@dataclass(frozen=True)
class Snapshot:
    """Receptive fields of a sample of one layer's units at one step; ``step`` None once pruned."""

    layer: str
    step: int | None
    weight: Array  # (n, D)
    units: Array  # (n,) global indices


@dataclass
class RunFolder:
    """The contents of a run folder; what a killed or unfinished run lacks is empty."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    analysis: dict[str, Array] = field(default_factory=dict)
    kernels: dict[str, Array] = field(default_factory=dict)  # layer → (K, C, k, k)
    snapshots: list[Path] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Read every part there is. Raises InputError where the folder holds no part of a run."""
        path = Path(path)
        if not path.is_dir():
            raise InputError(f"{path} is no folder; give the folder that dense2conv train wrote")
        run = cls(path)
        run.config_text, run.config = _config(path / "config.yaml")
        run.metrics = _records(path / "metrics.jsonl")
        run.summary = _object(path / "summary.json")
        run.analysis = _arrays(path / "extracted" / "analysis.npz")
        run.kernels = _kernels(path / "extracted")
        run.snapshots = sorted((path / "fields").glob("layer*_*.npz"))
        if not (run.metrics or run.summary or run.analysis or run.kernels or run.snapshots):
            raise InputError(
                f"{path} holds no part of a run: no metrics.jsonl, summary.json, fields/ or "
                "extracted/ that can be read; give the folder that dense2conv train wrote"
            )
        return run

    def setting(self, dotted: str, default: Any = None) -> Any:
        """A value of config.yaml by its dotted key."""
        value: Any = self.config
        for key in dotted.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return default
            value = value[key]
        return value

    @property
    def name(self) -> str:
        """run.name of the config, else the folder's name."""
        return str(self.setting("run.name") or self.path.resolve().name)

    def layers(self) -> list[str]:
        """Names of the layers that any part mentions, from the bottom up."""
        names = {p.name.split("_")[0] for p in self.snapshots}
        names |= {key.split("/")[0] for key in self.analysis if "/" in key}
        names |= set(self.kernels)
        numbered = [name for name in names if re.fullmatch(r"layer\d+", name)]
        return sorted(numbered, key=lambda name: int(name[5:]))

    def of_layer(self, layer: str) -> dict[str, Array]:
        """The analysis of one layer, by quantity."""
        start = layer + "/"
        return {k[len(start) :]: v for k, v in self.analysis.items() if k.startswith(start)}

    def summary_of(self, layer: str) -> dict[str, Any]:
        """The entry of the summary's list of layers that this one has; the config's, before that."""
        entries = self.summary.get("layers")
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and entry.get("name") == layer:
                return entry
        widths, index = self.setting("model.widths"), int(layer[5:]) - 1
        known = isinstance(widths, list) and index < len(widths)
        return {"name": layer, "num_units": widths[index]} if known else {}

    def snapshots_of(self, layer: str) -> tuple[list[tuple[int, Path]], Path | None]:
        """The files of one layer, ordered by step, and that of the pruned layer."""
        steps = []
        for path in self.snapshots:
            if match := re.fullmatch(rf"{layer}_step(\d+)\.npz", path.name):
                steps.append((int(match.group(1)), path))
        pruned = self.path / "fields" / f"{layer}_pruned.npz"
        return sorted(steps), pruned if pruned in self.snapshots else None

    def geometry(self, layer: str, num_inputs: int) -> Geometry | None:
        """Where a layer's inputs lie: the image, or the grid that the layer below discovered."""
        index = int(layer[5:])
        if index == 1:
            shape = self.image_shape(num_inputs)
            if shape is None:
                return None
            pixels = Geometry.of_image(shape)
            return permuted(pixels) if self.setting("data.permute_pixels") is True else pixels
        below = self.of_layer(f"layer{index - 1}")
        if not {"channel", "place_y", "place_x"} <= below.keys():
            return None
        channel, y, x = (
            torch.from_numpy(below[key].astype(np.int64))
            for key in ("channel", "place_y", "place_x")
        )
        placed = channel >= 0
        if channel.shape != (num_inputs,) or not placed.any():
            return None
        y, x = y - y[placed].min(), x - x[placed].min()
        grid = ImageShape(*(int(v[placed].max()) + 1 for v in (channel, y, x)))
        return Geometry(grid, channel, y, x)

    def image_shape(self, num_inputs: int) -> ImageShape | None:
        """The shape of layer 1's input: the config's where it fits, else a square of 1 or 3."""
        side, channels = self.setting("data.side"), self.setting("data.channels", 1)
        if isinstance(side, int) and isinstance(channels, int):
            shape = ImageShape(channels, side, side)
            if shape.numel == num_inputs:
                return shape
        for guess in (1, 3):
            root = math.isqrt(num_inputs // guess)
            if num_inputs and guess * root * root == num_inputs:
                return ImageShape(guess, root, root)
        return None


def read_snapshot(path: Path) -> Snapshot | None:
    """One file of ``fields/``, or None where it is broken or lacks its arrays."""
    arrays = _arrays(path)
    weight, units = arrays.get("weight"), arrays.get("units")
    if weight is None or weight.ndim != 2:
        return None
    if units is None or units.shape != (len(weight),):
        units = np.arange(len(weight))
    step = re.search(r"_step(\d+)$", path.stem)
    return Snapshot(path.stem.split("_")[0], int(step.group(1)) if step else None, weight, units)


def _config(path: Path) -> tuple[str, dict[str, Any]]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", {}
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError:
        loaded = None
    return text, loaded if isinstance(loaded, dict) else {}


def _records(path: Path) -> list[dict[str, Any]]:
    """Lines of a log that parse to objects; a kill may have cut the last one off."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _object(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _arrays(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError):
        return {}


def _kernels(folder: Path) -> dict[str, Array]:
    """Each layer's kernels (K, C, k, k) in their own order, of one shape, the commonest there is.

    A file keeps them by convolution, one for each stride; ``module.json`` says which are whose.
    """
    from safetensors import SafetensorError, safe_open

    banks: dict[str, list[Array]] = {}
    try:
        with safe_open(str(folder / "module.safetensors"), framework="np") as file:
            for key in sorted(file.keys(), key=_by_number):
                layer = re.search(r"layers?[._]?(\d+)", key)
                if layer and len(file.get_slice(key).get_shape()) == 4:
                    banks.setdefault(f"layer{layer.group(1)}", []).append(file.get_tensor(key))
    except (OSError, SafetensorError, TypeError):
        return {}
    described = _object(folder / "module.json").get("layers")
    found = {}
    for name, parts in banks.items():
        shapes = [part.shape[1:] for part in parts]
        commonest = max(shapes, key=shapes.count)
        kernels = np.concatenate([part for part in parts if part.shape[1:] == commonest])
        layer = described.get(name) if isinstance(described, dict) else None
        members = layer.get("kernels_of_conv") if isinstance(layer, dict) else None
        groups = members if isinstance(members, list) else []
        order = [k for group in groups if isinstance(group, list) for k in group]
        if all(isinstance(k, int) for k in order) and sorted(order) == list(range(len(kernels))):
            kernels = kernels[np.argsort(order)]
        found[name] = kernels
    return found


def _by_number(key: str) -> list[tuple[int, str]]:
    """Order in which convs.10 follows convs.9."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", key)]
