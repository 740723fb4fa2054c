"""The pruning phase: exact magnitude masks on the newest checkpoint, saved as a checkpoint."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from dense2conv.models import DenseLayer, DenseStack
from dense2conv.models.dense_stack import layer_name
from dense2conv.parallel import Mesh
from dense2conv.parallel.mesh import flat_mesh
from dense2conv.pruning import PruneConfig, magnitude_mask
from dense2conv.shapes import Axis, InputError
from dense2conv.training import checkpoint
from dense2conv.training.checkpoint import Checkpoints
from dense2conv.training.config import Config
from dense2conv.training.loop import build_stack, identity, save_fields
from dense2conv.training.optim import make_optimizer
from dense2conv.training.run_folder import RunFolder

log = logging.getLogger(__name__)

_MUCH = 0.02  # share of a layer's magnitude whose loss is worth a word


def load_newest(config: Config, mesh: Mesh, folder: RunFolder, num_inputs: int) -> DenseStack:
    """The network of the newest checkpoint, spread over ``mesh``.

    Raises:
        InputError: the run has no checkpoint yet.
    """
    stack = build_stack(config, mesh, num_inputs)
    checkpoint.load(_newest(folder), mesh, stack, None, identity(config))
    return stack


def _newest(folder: RunFolder) -> Path:
    newest = checkpoint.latest(folder.checkpoints)
    if newest is None:
        raise InputError(
            f"{folder.path} holds no checkpoint; train first: dense2conv train "
            f"run.name={folder.path.name}"
        )
    return newest


def prune(config: Config, mesh: Mesh, folder: RunFolder) -> None:
    """Mask the smallest weights of the newest checkpoint, on one tensor-parallel axis of all
    processes.

    The masks stay through further training: ``dense2conv train … resume=true train.steps=MORE``.

    Raises:
        InputError: the run has no checkpoint yet.
    """
    newest = _newest(folder)
    flat = flat_mesh(mesh)
    stack = build_stack(config, flat, config.data.shape.numel)
    optimizer = make_optimizer(config.optimizer, stack, config.objective.l1)
    step = checkpoint.load(newest, flat, stack, optimizer, identity(config))

    layers = [stack.layer(i) for i in stack.indices]
    before = [magnitude(layer, flat.tp) for layer in layers]
    mask_smallest(config.prune, layers, flat.tp)
    lost = [
        1 - magnitude(layer, flat.tp) / all_of_it if all_of_it else 0.0
        for layer, all_of_it in zip(layers, before, strict=True)
    ]
    save_fields(config, flat, folder, stack, "pruned")
    network, timeout_s = identity(config), config.parallel.timeout_s
    checkpoints = Checkpoints(config.checkpoint, folder.checkpoints, flat, network, timeout_s)
    checkpoints.extra = checkpoint.extra_of(newest)
    checkpoints.save(step, stack, optimizer, pruned=True, copy=False)
    checkpoints.wait()
    kept = [int(flat.tp.sum(layer.mask.count_nonzero())) for layer in layers]  # type: ignore[union-attr]
    if mesh.is_main:
        total = sum(layer.num_units * layer.num_inputs for layer in layers)
        for i, share in enumerate(lost):
            if share > _MUCH:
                log.warning(
                    "warning: pruning took %.0f %% of the magnitude of %s's weights; if its figures "
                    "fall, lower prune.sparsity=%g (a unit of %d inputs keeps %d weights on average)",
                    *(100 * share, layer_name(i), config.prune.sparsity, layers[i].num_inputs),
                    round(kept[i] / layers[i].num_units),
                )
        log.info(
            "pruned: %d of %d weights stay (%.1f %%)", sum(kept), total, 100 * sum(kept) / total
        )


@torch.no_grad()
def mask_smallest(config: PruneConfig, layers: Sequence[DenseLayer], axis: Axis) -> None:
    """Mask the smallest weights of layers whose units are spread over ``axis``.

    No process waits for a value of its device.
    """
    sizes = [layer.num_units * layer.num_inputs for layer in layers]
    counts = [size - math.ceil(config.sparsity * size) for size in sizes]
    shards = [layer.weight.detach() for layer in layers]
    if config.scope == "global":
        masks = magnitude_mask(shards, sum(counts), axis)
    else:
        masks = [
            magnitude_mask([shard], count, axis)[0]
            for shard, count in zip(shards, counts, strict=True)
        ]
    for layer, mask in zip(layers, masks, strict=True):
        layer.set_mask(mask)


def magnitude(layer: DenseLayer, axis: Axis) -> float:
    """‖W‖₁ of a whole layer whose units are spread over ``axis``."""
    rows = torch.linalg.vector_norm(layer.weight.detach(), 1, dim=1)  # makes no copy of the weights
    return float(axis.sum(rows.double().sum()))
