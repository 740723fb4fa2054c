"""The pictures of a run by name, for those who show them beside the page, such as W&B."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dense2conv.report.images import kernel_bank, montage
from dense2conv.report.run_folder import RunFolder, read_snapshot


def run_pictures(run_folder: Path) -> dict[str, Image.Image]:
    """A montage of the first layer's receptive fields behind pruning, and every layer's kernels."""
    run = RunFolder.read(run_folder)
    pictures: dict[str, Image.Image] = {}
    _, pruned = run.snapshots_of("layer1")
    snapshot = read_snapshot(pruned) if pruned is not None else None
    shape = run.image_shape(snapshot.weight.shape[1]) if snapshot else None
    if snapshot is not None and shape is not None:
        pictures["pruned_fields"] = montage(snapshot.weight, shape, max_units=64)
    for layer, kernels in run.kernels.items():
        pictures[f"{layer}/kernels"] = kernel_bank(kernels)
    return pictures
