"""What a training step sends: every collective of one process, with its bytes.

It mirrors ``parallel.engines.native`` and ``objectives.logdet`` call by call, and a test counts the
calls of the real code against it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

from dense2conv.models.dense_stack import layer_name
from dense2conv.objectives.gram import panels
from dense2conv.parallel.products import row_chunks
from dense2conv.planner.share import LayerShare, Rate, Share


@dataclass(frozen=True)
class Collective:
    """``count`` calls a step over one mesh axis.

    num_bytes: of one call: of the joined tensor of an all_gather or reduce_scatter, the tensor of an
    all_reduce, send or receive, and what an all_to_all sends to others, or gets of them if that is more.
    """

    purpose: str
    kind: str
    axis: str
    num_bytes: int
    count: int = 1

    def sent_bytes(self, size: int) -> float:
        """Bytes a process sends a step, by the ring algorithms; ``size`` processes on the axis."""
        ring = (size - 1) / size
        share = {"all_gather": ring, "reduce_scatter": ring, "all_reduce": 2 * ring}
        return self.count * self.num_bytes * share.get(self.kind, 1.0)


def step_collectives(share: Share) -> list[Collective]:
    """All collectives of a step of the first process of a stage; none over axes of size 1."""
    calls = _forward(share)
    for layer in share.coded:
        calls += _objective(share, layer)
    calls += _gradients(share)
    if share.config.optimizer.clip is not None:
        calls += _norms(share)
    calls += [
        Collective(f"metrics of {layer_name(layer.index)}", "all_reduce", axis, 3 * 8)
        for layer in share.layers
        for axis in _row_axes(share)
    ]
    return [call for call in calls if getattr(share.mesh, call.axis) > 1]


def _row_axes(share: Share) -> tuple[str, ...]:
    """What the rows of weights are spread over."""
    return ("tp", share.mesh.shard_axis) if share.mesh.is_sharded else ("tp",)


def _norms(share: Share) -> list[Collective]:
    """The square of each layer's gradient, or of all of the stage, and then of all stages."""
    count = 1 if share.is_network else len(share.layers)
    size = share.precision.master
    calls = [
        Collective("norm of gradients", "all_reduce", axis, size, count)
        for axis in _row_axes(share)
    ]
    if share.is_network:
        calls.append(Collective("norm of gradients", "all_reduce", "pp", size))
    return calls


def _forward(share: Share) -> list[Collective]:
    mesh, compute = share.mesh, share.precision.compute
    rows, calls = share.num_microbatch_rows, []
    if share.is_first:
        image = share.config.data.shape.numel * share.pixel_bytes
        calls.append(_gather("pixels", "tp", mesh.tp, share.num_rows, image))
        if share.config.data.input_noise_std > 0:
            noise = share.config.data.shape.numel * 4
            calls.append(_gather("input noise", "tp", mesh.tp, share.num_rows, noise))
    for layer in share.layers:
        name = layer_name(layer.index)
        calls += _rows(share, layer)
        if layer.index > 0:
            if layer == share.layers[0]:
                below = rows * share.held(layer.num_inputs) * compute
                calls += _neighbours(share, "receive", f"activations to {name}", below)
            calls += _inputs(share, layer)
        if layer.index == len(share.config.model.widths) - 1:
            continue
        if share.config.model.standardise:
            moments = (layer.num_held + 1) * 8
            calls.append(Collective(f"moments of {name}", "all_reduce", "dp", moments))
            calls.append(Collective(f"moments of {name}", "all_reduce", "tp", 8))
        if layer == share.layers[-1]:
            shown = rows * layer.num_held * compute
            calls += _neighbours(share, "send", f"activations of {name}", shown)
    return calls


def _inputs(share: Share, layer: LayerShare) -> list[Collective]:
    """What a product with spread inputs sends forward: these, or blocks of weights and outputs."""
    name, size, number = layer_name(layer.index), share.mesh.tp, share.precision.compute
    of_a_row = _gather(f"activations to {name}", "tp", size, layer.num_inputs, number)
    calls = []
    if share.exchanges(layer):
        calls.append(_block(share, layer, f"weights of {name}"))
        outputs = _gather(f"outputs of {name}", "tp", size, layer.num_units, number)
        of_a_row = replace(outputs, kind="reduce_scatter")
    return calls + _in_chunks(of_a_row, share.num_microbatch_rows, share.mesh.microbatches)


def _input_gradients(share: Share, layer: LayerShare) -> list[Collective]:
    """What it sends backward: the sum of the inputs' gradients, or those of outputs and of blocks."""
    name, size, number = layer_name(layer.index), share.mesh.tp, share.precision.compute
    joined = _gather(f"gradient to {name}'s inputs", "tp", size, layer.num_inputs, number)
    of_a_row, calls = replace(joined, kind="reduce_scatter"), []
    if share.exchanges(layer):
        of_a_row = _gather(f"gradient of {name}'s outputs", "tp", size, layer.num_units, number)
        calls.append(_block(share, layer, f"gradient of {name}'s weights"))
    return calls + _in_chunks(of_a_row, share.num_microbatch_rows, share.mesh.microbatches)


def _block(share: Share, layer: LayerShare, purpose: str) -> Collective:
    """Own units' weights for the others' inputs, in exchange for those of their units for own ones."""
    units, inputs = layer.num_held, share.held(layer.num_inputs)
    largest = max(units * (layer.num_inputs - inputs), (layer.num_units - units) * inputs)
    num_bytes = largest * share.precision.compute
    return Collective(purpose, "all_to_all", "tp", num_bytes, share.mesh.microbatches)


def _rows(share: Share, layer: LayerShare) -> list[Collective]:
    """What processes along dp keep of a layer's rows, brought together for its products."""
    if not share.mesh.is_sharded:
        return []
    axis, size = share.mesh.shard_axis, share.mesh.shard_size
    compute, name = share.precision.compute, layer_name(layer.index)
    times = 1
    if share.mesh.shard == "weights" and share.is_network and layer.index > 0:
        times += share.mesh.microbatches  # once more for the gradient of each piece's input
    row = layer.num_inputs * compute
    calls = [replace(_gather(f"rows of {name}", axis, size, layer.num_held, row), count=times)]
    if share.config.model.bias:
        calls.append(_gather(f"bias of {name}", axis, size, layer.num_held, compute))
    return calls


def _objective(share: Share, layer: LayerShare) -> list[Collective]:
    objective, number = share.config.objective, share.precision.master
    name = layer_name(layer.index)
    is_global = objective.batch_scope == "global"
    calls = []
    if objective.on == "post" and is_global:  # the mean, and its gradient
        mean = layer.num_held * number
        calls.append(Collective(f"mean of {name}", "all_reduce", "dp", mean, count=2))
    for rate in share.rates(layer):
        for digits in share.gram_bytes:
            calls += _gram(rate, digits)
        if rate.rows_at_once and not rate.is_dual and rate.tp > 1:  # once more for the gradient
            calls += _blocks(rate, share.gram_bytes[-1])
    if is_global:
        calls.append(Collective(f"power of {name}", "all_reduce", "dp", number))
    else:  # what each process found is logged as its mean
        calls.append(Collective(f"terms of {name}", "all_reduce", "dp", 2 * 8))
    calls.append(Collective(f"power of {name}", "all_reduce", "tp", number))
    return calls


def _gram(rate: Rate, number: int) -> list[Collective]:
    """A Gram matrix of numbers of ``number`` bytes: gather, sums, and gather of the rows made here."""
    samples = "dp", rate.dp, rate.num_samples, rate.num_rows
    units = "tp", rate.tp, rate.num_units, rate.num_held
    rows, inner = (samples, units) if rate.is_dual else (units, samples)
    (axis, size, n, made), (inner_axis, inner_size, _, held) = rows, inner
    calls = []
    if inner_size > 1:
        for panel in panels(made):
            # A process that has all rows makes the lower triangle alone.
            numbers = len(panel) * (panel.stop if size == 1 else n)
            calls.append(Collective(rate.purpose, "all_reduce", inner_axis, numbers * number))
    if size > 1:
        calls.append(_gather(rate.purpose, axis, size, n, n * number))
        if rate.is_dual:
            calls.append(_gather(rate.purpose, axis, size, n, held * number))
        else:
            calls += _blocks(rate, number)
    return calls


def _blocks(rate: Rate, number: int) -> list[Collective]:
    """All features of own samples, of some samples at a time where the rate says so."""
    return [
        replace(_gather(rate.purpose, "tp", rate.tp, rate.num_units, rows * number), count=count)
        for rows, count in Counter(rate.blocks).items()
    ]


def _gradients(share: Share) -> list[Collective]:
    calls = []
    for layer in share.layers:
        name = layer_name(layer.index)
        if share.is_network and layer.index > 0:
            calls += _input_gradients(share, layer)
        calls += _gradient(share, layer, f"gradient of {name}", layer.num_inputs)
        if share.config.model.bias:
            calls += _gradient(share, layer, f"gradient of {name}'s bias", 1)
    return calls


def _gradient(share: Share, layer: LayerShare, purpose: str, row: int) -> list[Collective]:
    """The sum over dp of rows' gradients, each ``row`` numbers: of all rows, or of those kept here."""
    mesh, number = share.mesh, share.precision
    kept = layer.num_kept * row * number.master
    if not mesh.is_sharded:
        return [Collective(purpose, "all_reduce", "dp", kept)]
    # A stage that has to send gradients on makes them piece by piece.
    pieces = mesh.microbatches if share.is_network and not share.is_first else 1
    joined = _gather(
        purpose, mesh.shard_axis, mesh.shard_size, layer.num_held, row * number.compute
    )
    return [
        replace(joined, kind="reduce_scatter", count=pieces),
        Collective(purpose, "all_reduce", "dp_replicate", kept),
    ]


def _neighbours(share: Share, kind: str, purpose: str, num_bytes: int) -> list[Collective]:
    """What passes between two stages; with one objective at the top its gradient comes back."""
    pieces = share.mesh.microbatches
    calls = [Collective(purpose, kind, "pp", num_bytes, pieces)]
    if share.is_network:
        back = {"send": "receive", "receive": "send"}[kind]
        calls.append(Collective(f"gradient of {purpose}", back, "pp", num_bytes, pieces))
    return calls


def _in_chunks(of_a_row: Collective, num_rows: int, count: int) -> list[Collective]:
    """``count`` products of ``num_rows`` rows each, whose inputs travel in chunks of rows."""
    chunks = Counter(row_chunks(num_rows))
    return [
        replace(of_a_row, num_bytes=length * of_a_row.num_bytes, count=count * number)
        for length, number in chunks.items()
    ]


def _gather(
    purpose: str, axis: str, size: int, total: int, row_bytes: int, count: int = 1
) -> Collective:
    """Shards are padded to one length, so the joined tensor may be longer than ``total`` rows."""
    padded = math.ceil(total / size) * size
    return Collective(purpose, "all_gather", axis, padded * row_bytes, count)
