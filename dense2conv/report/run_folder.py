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
from numpy.typing import NDArray

from dense2conv.shapes import ImageShape, InputError

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
    kernels: dict[str, list[Array]] = field(default_factory=dict)  # layer → (K, C, k, k) each
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
        run.kernels = _kernels(path / "extracted" / "module.safetensors")
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

    def snapshots_of(self, layer: str) -> tuple[list[tuple[int, Path]], Path | None]:
        """The files of one layer, ordered by step, and that of the pruned layer."""
        steps = []
        for path in self.snapshots:
            if match := re.fullmatch(rf"{layer}_step(\d+)\.npz", path.name):
                steps.append((int(match.group(1)), path))
        pruned = self.path / "fields" / f"{layer}_pruned.npz"
        return sorted(steps), pruned if pruned in self.snapshots else None

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


def _kernels(path: Path) -> dict[str, list[Array]]:
    """Convolution kernels of an extracted network: the (K, C, k, k) tensors, by layer."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, list[Array]] = {}
    try:
        with safe_open(str(path), framework="np") as file:
            for key in sorted(file.keys()):
                layer = re.search(r"layers?[._]?(\d+)", key)
                if layer and len(file.get_slice(key).get_shape()) == 4:
                    found.setdefault(f"layer{layer.group(1)}", []).append(file.get_tensor(key))
    except (OSError, SafetensorError, TypeError):
        return {}
    return found
