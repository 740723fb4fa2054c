"""The life of a run, top to bottom: build, resume, step, log, save."""

from __future__ import annotations

import time
from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dense2conv.data import ImageSource, add_input_noise
from dense2conv.models import DenseStack
from dense2conv.models.dense_stack import layer_name
from dense2conv.objectives import EfficientCoding
from dense2conv.objectives.factorisation import NotFinite
from dense2conv.parallel import Mesh
from dense2conv.parallel.engines import make_engine
from dense2conv.shapes import InputError
from dense2conv.training.checkpoint import Checkpoints
from dense2conv.training.config import Config
from dense2conv.training.measures import (
    Fields,
    Value,
    field_metrics,
    layer_flops,
    layer_metrics,
    layer_prefix,
    shares_of_the_step,
)
from dense2conv.training.metrics import MetricsLog, Sink
from dense2conv.training.optim import learning_rate, make_optimizer
from dense2conv.training.profiling import profiler
from dense2conv.training.run_folder import RunFolder
from dense2conv.training.signals import StopRequest
from dense2conv.training.strengths import Strengths

_SNAPSHOTS = (0.0, 0.02, 0.1, 0.25, 0.5, 1.0)  # shares of the run at which fields are kept
_MAX_SNAPSHOT = 4_000_000  # numbers in one snapshot
_SHOWN = 64  # receptive fields of a snapshot that are drawn while the run goes on


def train(
    config: Config, mesh: Mesh, folder: RunFolder, source: ImageSource, sinks: list[Sink]
) -> None:
    """Train from scratch or from the last good checkpoint to ``train.steps``.

    Every process of the mesh calls this. What it leaves is in ``folder``: metrics, snapshots of
    receptive fields, and checkpoints, the last one at the final step.

    Raises:
        Stopped: a signal ended it after a whole step, which is saved.
        InputError: so did images that were there and cannot be read any more.
    """
    stack = build_stack(config, mesh, len(source.geometry)).init(config.seed)
    optimizer = make_optimizer(config.optimizer, stack, config.objective.l1, config.train.compile)
    objective = EfficientCoding(config.objective, stack.activation, config.data.input_noise_std)
    batch, steps = config.train.batch, config.train.steps

    network, timeout_s = identity(config), config.parallel.timeout_s
    checkpoints = Checkpoints(config.checkpoint, folder.checkpoints, mesh, network, timeout_s)
    resumed = checkpoints.resume(stack, optimizer) if config.resume else None
    start = resumed or 0
    images = mesh.broadcast_object(source.fingerprint() if mesh.is_main else None)
    refuse_changed_images(checkpoints.extra.get("images"), images, config.data.accept)
    checkpoints.extra["images"] = images
    strengths = Strengths(config.objective, stack, optimizer, checkpoints.extra.get("lambda"))
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
        config.train.compute_dtype,
        config.parallel.shard == "weights",
        config.train.compile,
    )

    rows = mesh.dp.shard(batch)
    snapshots = {round(share * steps) for share in _SNAPSHOTS} - {0}
    flops = layer_flops(
        [len(source.geometry), *config.model.widths], config.objective.scope == "network"
    )
    alarm = config.log.dead_alarm
    metrics = MetricsLog(mesh, folder, start, steps, sinks, batch, flops, alarm)
    if resumed is None:
        with engine.whole():
            metrics.record(0, save_fields(config, mesh, folder, stack, "step00000000"))
    tracing = profiler(folder) if config.profile and mesh.is_main else None
    enter = mesh.position.enter  # so that others can say where this process was, if it hangs
    with StopRequest(mesh) as stop, tracing or nullcontext():
        for step in range(start, steps):
            done = step + 1
            began, limited = time.monotonic(), step > start  # the first one compiles, and connects
            enter("reading images", done, limited)
            x = next_batch(config, mesh, source, step, rows) if engine.takes_images else None
            if engine.takes_images:
                stop.report(source.failure_ahead(min(stop.notice, steps - done)))
            read = time.monotonic()
            enter("forward and backward", done, limited)
            with named_share(mesh, stack, x):
                terms = engine.forward_backward(x)
            enter("update", done, limited)
            lr = learning_rate(config.optimizer, step, steps)
            engine.step(lr)  # ends in the proximal step and the masks

            enter("metrics", done, limited)
            values: dict[str, Tensor | Value] = {"lr": lr}
            with engine.whole():
                measured = layer_metrics(stack, terms, strengths)
                values |= measured
                if done % config.log.radius_every == 0 or done == steps:
                    values |= field_metrics(stack, source)
                if done in snapshots:
                    values |= save_fields(config, mesh, folder, stack, f"step{done:08d}")
            zeros = {i: measured[f"{layer_prefix(i)}sparsity"] for i in strengths}
            strengths.steer(zeros, done / steps)
            values |= shares_of_the_step(mesh, engine, read - began, time.monotonic() - began)
            metrics.record(done, values)
            if tracing is not None:
                tracing.step()
            stopping = stop.requested() and done < steps
            at_checkpoint = done % config.checkpoint.every == 0 or done == steps or stopping
            if at_checkpoint or done % config.log.every == 0:
                metrics.flush()
            if at_checkpoint:
                enter("checkpoint", done, limited=False)
                engine.drain()
                stages = mesh.join_stages(strengths.state()) or []
                checkpoints.extra["lambda"] = dict(ChainMap(*stages))
                with engine.whole(with_optimizer=True):
                    checkpoints.save(done, stack, optimizer, values)
            if stopping:
                metrics.close()
                checkpoints.wait()
                raise stop.ending(done, steps)
    enter("checkpoint", steps, limited=False)
    metrics.close()
    checkpoints.wait()


@contextmanager
def named_share(mesh: Mesh, stack: DenseStack, x: Tensor | None) -> Iterator[None]:
    """NaN in sums over processes is everyone's: whoever brought it says so, for the one that speaks."""
    try:
        yield
    except NotFinite as error:
        own: dict[str, Tensor] = {} if x is None else {"the images": x}
        own |= dict(stack.named_parameters())
        bad = [name for name, tensor in own.items() if not bool(tensor.isfinite().all())]
        mesh.position.found = f"NaN or Inf in {' and '.join(bad)}" if bad else ""
        raise InputError(str(error)) from error


def build_stack(config: Config, mesh: Mesh, num_inputs: int) -> DenseStack:
    """This process's share of the network, allocated and not yet filled."""
    layers = mesh.stage(len(config.model.widths))
    with mesh.device:
        return DenseStack(
            num_inputs,
            config.model,
            mesh.layout,
            layers,
            config.train.torch_dtype,
            mesh.rows,
        )


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


def refuse_changed_images(before: str | None, now: str, accepted: str | None) -> None:
    """Raise InputError where a run would go on with other images than it was trained on so far."""
    if before not in (None, now) and accepted != now:
        raise InputError(
            f"the run was trained on the images {before} (their number, and what their names and labels "
            f"add up to), but there are {now} now; put those back, or accept these with "
            f"data.accept={now}"
        )


def next_batch(config: Config, mesh: Mesh, source: ImageSource, step: int, rows: range) -> Tensor:
    """Own samples of the batch with their input noise: (m/dp, D), a pure function of (seed, step).

    The processes of a tp group need the same samples: each reads its share, and they exchange pixels
    as they come from the file, a byte each, and the noise that each has drawn for its share.
    """
    share = mesh.tp.shard(len(rows))
    own = rows[share.start : share.stop]
    pixels = source.read(step, config.train.batch, own).pixels.to(mesh.device)
    pixels = mesh.tp.gather(pixels, len(rows))  # (m/dp, D)
    x = source.standardise(pixels).to(config.train.torch_dtype)
    return add_input_noise(x, config.data.input_noise_std, config.seed, step, rows, mesh.tp)


@torch.no_grad()
def save_fields(
    config: Config, mesh: Mesh, folder: RunFolder, stack: DenseStack, name: str
) -> dict[str, Value]:
    """Keep a sample of every held layer's receptive fields for the report, as an npz file a layer.

    Returns:
        Some of the first layer's, to be drawn at once, where this process speaks for that layer.
    """
    shown: dict[str, Value] = {}
    for i in stack.indices:
        layer = stack.layer(i)
        most = max(16, _MAX_SNAPSHOT // layer.num_inputs)
        num = min(layer.num_units, config.log.num_fields, most)
        units = np.linspace(0, layer.num_units - 1, num).round().astype(np.int64)
        sample = torch.zeros(num, layer.num_inputs, device=mesh.device)
        for place, unit in enumerate(units):
            if unit in layer.units:
                sample[place] = layer.weight[unit - layer.units.start].float()
        sample = stack.rows.sum(sample)
        if mesh.writes_shards:
            weight = sample.cpu().numpy()
            path = folder.fields / f"{layer_name(i)}_{name}.npz"
            np.savez_compressed(path, weight=weight, units=units)
            if i == 0:
                shown["fields"] = Fields(weight[:: -(-num // _SHOWN)])
    return shown
