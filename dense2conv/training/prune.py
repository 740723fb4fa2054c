"""The pruning phase: exact magnitude masks on the newest checkpoint, saved as a checkpoint."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from torch import Tensor

from dense2conv.models import DenseStack
from dense2conv.models.dense_stack import layer_name
from dense2conv.parallel import Mesh
from dense2conv.parallel.mesh import flat_mesh
from dense2conv.pruning import magnitude_mask
from dense2conv.shapes import InputError
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
    sizes = [layer.num_units * layer.num_inputs for layer in layers]
    counts = [size - math.ceil(config.prune.sparsity * size) for size in sizes]
    shards = [layer.weight.detach() for layer in layers]
    if config.prune.scope == "global":
        masks = magnitude_mask(shards, sum(counts), flat.tp)
    else:
        masks = [
            magnitude_mask([shard], count, flat.tp)[0]
            for shard, count in zip(shards, counts, strict=True)
        ]
    lost = [
        _magnitude_lost(layer.weight, mask, flat) for layer, mask in zip(layers, masks, strict=True)
    ]
    for layer, mask in zip(layers, masks, strict=True):
        layer.set_mask(mask)
    save_fields(config, flat, folder, stack, "pruned")
    network, timeout_s = identity(config), config.parallel.timeout_s
    checkpoints = Checkpoints(config.checkpoint, folder.checkpoints, flat, network, timeout_s)
    checkpoints.save(step, stack, optimizer, pruned=True, extra=checkpoint.extra_of(newest))
    checkpoints.wait()
    kept = [float(flat.tp.sum(mask.sum(dtype=torch.float64))) for mask in masks]
    if mesh.is_main:
        total = sum(sizes)
        for i, share in enumerate(lost):
            if share > _MUCH:
                log.warning(
                    "warning: pruning took %.0f %% of the magnitude of %s's weights; if its figures "
                    "fall, lower prune.sparsity=%g (a unit of %d inputs keeps %d weights on average)",
                    *(100 * share, layer_name(i), config.prune.sparsity, layers[i].num_inputs),
                    round(kept[i] / layers[i].num_units),
                )
        log.info(
            "pruned: %.0f of %d weights stay (%.1f %%)", sum(kept), total, 100 * sum(kept) / total
        )


def _magnitude_lost(weight: Tensor, mask: Tensor, mesh: Mesh) -> float:
    """The share of Σ|w| that a mask takes away."""
    magnitude = weight.detach().abs().double()
    sums = mesh.tp.sum(torch.stack([(magnitude * ~mask).sum(), magnitude.sum()]))
    return float(sums[0] / sums[1].clamp(min=1e-300))
