"""The pictures of a run by name, for those who show them beside the page, such as W&B."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dense2conv.report.images import kernel_bank, montage
from dense2conv.report.run_folder import RunFolder, read_snapshot


def run_pictures(run_folder: Path) -> dict[str, Image.Image]:
    """Montages of the first layer's receptive fields over time, and every layer's kernels."""
    run = RunFolder.read(run_folder)
    pictures: dict[str, Image.Image] = {}
    steps, pruned = run.snapshots_of("layer1")
    named = [(f"step {step}", path) for step, path in steps]
    if pruned is not None:
        named.append(("pruned", pruned))
    for name, path in named:
        snapshot = read_snapshot(path)
        shape = run.image_shape(snapshot.weight.shape[1]) if snapshot else None
        if snapshot is not None and shape is not None:
            pictures[f"receptive fields/{name}"] = montage(snapshot.weight, shape, max_units=64)
    for layer, kernels in run.kernels.items():
        pictures[f"kernels/{layer}"] = kernel_bank(kernels)
    return pictures
