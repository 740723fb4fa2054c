"""The life of a run, top to bottom: build, resume, step, log, save."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dense2conv.data import ImageSource, add_input_noise
from dense2conv.models import DenseStack
from dense2conv.models.dense_stack import layer_name
from dense2conv.objectives import EfficientCoding
from dense2conv.parallel import Mesh
from dense2conv.parallel.engines import make_engine
from dense2conv.structure.locality import receptive_fields
from dense2conv.training.checkpoint import Checkpoints
from dense2conv.training.config import Config
from dense2conv.training.metrics import MetricsLog, layer_metrics
from dense2conv.training.optim import learning_rate, make_optimizer
from dense2conv.training.run_folder import RunFolder
from dense2conv.training.signals import Stopped, StopRequest

Sink = Callable[[int, dict[str, float]], None]
_SNAPSHOTS = (0.0, 0.02, 0.1, 0.25, 0.5, 1.0)  # shares of the run at which fields are kept
_MAX_SNAPSHOT = 4_000_000  # numbers in one snapshot


def train(
    config: Config, mesh: Mesh, folder: RunFolder, source: ImageSource, sinks: list[Sink]
) -> None:
    """Train from scratch or from the last good checkpoint to ``train.steps``.

    Every process of the mesh calls this. What it leaves is in ``folder``: metrics, snapshots of
    receptive fields, and checkpoints, the last one at the final step.

    Raises:
        Stopped: a signal ended it after a whole step, which is saved.
    """
    stack = build_stack(config, mesh, len(source.geometry)).init(config.seed)
    optimizer = make_optimizer(config.optimizer, stack, config.objective.l1)
    objective = EfficientCoding(config.objective, stack.activation, config.data.input_noise_std)
    batch, steps = config.train.batch, config.train.steps

    network, timeout_s = identity(config), config.parallel.timeout_s
    checkpoints = Checkpoints(config.checkpoint, folder.checkpoints, mesh, network, timeout_s)
    start = checkpoints.resume(stack, optimizer) if config.resume else None
    if start is None:
        start = 0
        save_fields(config, mesh, folder, stack, "step00000000")
    engine = make_engine(
        config.engine,
        config.deepspeed,
        mesh,
        stack,
        objective,
        optimizer,
        batch,
        config.parallel.microbatches,
        config.optimizer.clip,
    )

    rows = mesh.dp.shard(batch)
    snapshots = {round(share * steps) for share in _SNAPSHOTS} - {0}
    metrics = MetricsLog(mesh, folder, start, steps, sinks)
    began = time.monotonic()
    with StopRequest(mesh) as stop:
        for step in range(start, steps):
            x = next_batch(config, mesh, source, step, rows) if engine.takes_images else None
            terms = engine.forward_backward(x)
            lr = learning_rate(config.optimizer, step, steps)
            engine.step(lr)  # ends in the proximal step and the masks

            done = step + 1
            values: dict[str, Tensor | float] = {"lr": lr}
            with engine.whole():
                values |= layer_metrics(mesh, stack, terms, config.objective.l1)
                if done % config.log.radius_every == 0 or done == steps:
                    values |= median_radius(mesh, stack, source)
                if done in snapshots:
                    save_fields(config, mesh, folder, stack, f"step{done:08d}")
            values["steps_per_second"] = (done - start) / (time.monotonic() - began)
            metrics.record(done, values)
            stopping = stop.requested() and done < steps
            at_checkpoint = done % config.checkpoint.every == 0 or done == steps or stopping
            if at_checkpoint or done % config.log.every == 0:
                metrics.flush()
            if at_checkpoint:
                engine.drain()
                with engine.whole(with_optimizer=True):
                    checkpoints.save(done, stack, optimizer, values)
            if stopping:
                metrics.close()
                checkpoints.wait()
                raise Stopped(
                    f"stopped by {stop.reason} after step {done} of {steps}, which is saved"
                )
    metrics.close()
    checkpoints.wait()


def build_stack(config: Config, mesh: Mesh, num_inputs: int) -> DenseStack:
    """This process's share of the network, allocated and not yet filled."""
    layers = mesh.stage(len(config.model.widths))
    with mesh.device:
        return DenseStack(num_inputs, config.model, mesh.layout, layers, config.train.torch_dtype)


def identity(config: Config) -> dict[str, Any]:
    """What makes two runs the same network, as far as a checkpoint is concerned."""
    return {
        "data.side": config.data.side,
        "data.channels": config.data.channels,
        "model.widths": list(config.model.widths),
        "model.nonlinearity": config.model.nonlinearity,
        "model.bias": config.model.bias,
        "model.standardise": config.model.standardise,
        "train.dtype": config.train.dtype,
    }


def next_batch(config: Config, mesh: Mesh, source: ImageSource, step: int, rows: range) -> Tensor:
    """Own samples of the batch with their input noise: (m/dp, D), a pure function of (seed, step).

    The processes of a tp group need the same samples: each reads its share, and they exchange pixels
    as they come from the file, a byte each.
    """
    share = mesh.tp.shard(len(rows))
    own = rows[share.start : share.stop]
    pixels = source.read(step, config.train.batch, own).pixels.to(mesh.device)
    pixels = mesh.tp.gather(pixels, len(rows))  # (m/dp, D)
    x = source.standardise(pixels).to(config.train.torch_dtype)
    return add_input_noise(x, config.data.input_noise_std, config.seed, step, rows)


def median_radius(mesh: Mesh, stack: DenseStack, source: ImageSource) -> dict[str, float]:
    """The median radius in pixels of the first layer's live units, where this process holds them."""
    if 0 not in stack.indices:
        return {}
    layer = stack.layer(0)
    fields = receptive_fields(layer.weight.detach(), source.geometry)
    radius = torch.where(fields.alive, fields.radius, torch.nan)
    radius = mesh.tp.gather(radius, layer.num_units)
    return {"radius": float(radius.nanmedian())}


@torch.no_grad()
def save_fields(
    config: Config, mesh: Mesh, folder: RunFolder, stack: DenseStack, name: str
) -> None:
    """Keep a sample of every held layer's receptive fields for the report, as an npz file a layer."""
    for i in stack.indices:
        layer = stack.layer(i)
        most = max(16, _MAX_SNAPSHOT // layer.num_inputs)
        num = min(layer.num_units, config.log.num_fields, most)
        units = np.linspace(0, layer.num_units - 1, num).round().astype(np.int64)
        sample = torch.zeros(num, layer.num_inputs, device=mesh.device)
        for place, unit in enumerate(units):
            if unit in layer.units:
                sample[place] = layer.weight[unit - layer.units.start].float()
        sample = mesh.tp.sum(sample)
        if mesh.writes_shards:
            path = folder.fields / f"{layer_name(i)}_{name}.npz"
            np.savez_compressed(path, weight=sample.cpu().numpy(), units=units)
