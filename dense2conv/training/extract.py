"""The extraction phase: every layer of the pruned network becomes a convolution, verified and tuned."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dense2conv.data import Images, ImageSource, add_input_noise
from dense2conv.models import DenseLayer
from dense2conv.models.dense_stack import layer_name
from dense2conv.objectives import EfficientCoding, ObjectiveConfig
from dense2conv.parallel import Mesh
from dense2conv.parallel.mesh import flat_mesh
from dense2conv.shapes import Axis, Layout
from dense2conv.structure import (
    ExtractedLayer,
    ExtractedStack,
    LayerExtraction,
    extract_layer,
    save,
)
from dense2conv.training.checkpoint import extra_of, latest
from dense2conv.training.config import Config
from dense2conv.training.prune import load_newest, magnitude
from dense2conv.training.run_folder import RunFolder
from dense2conv.training.tuning import tune
from dense2conv.training.verification import (
    NUM_HELD_OUT,
    PIECE,
    HeldOut,
    controls,
    explained,
    held_out,
    in_pieces,
    whitening_gain,
)

log = logging.getLogger(__name__)


@torch.no_grad()
def extract(config: Config, mesh: Mesh, folder: RunFolder, source: ImageSource) -> dict[str, Any]:
    """Analyse, emit, verify, tune and verify again; every process calls this.

    Runs on one tensor-parallel axis of all processes: each analyses the units it holds. Figures
    are of single layers: both networks are shown the inputs that the dense layers below give. Only
    ``heldout_…_conv`` is of the extracted network as a whole, tuned, from the pixels up.

    Returns:
        The figures for ``summary.json``: layer 1's, and those of every layer in ``layers``.

    Raises:
        InputError: the run has no checkpoint yet.
    """
    flat = flat_mesh(mesh)
    dense = load_newest(config, flat, folder, len(source.geometry))
    newest = latest(folder.checkpoints)
    steered = extra_of(newest).get("lambda", {}) if newest else {}

    geometry = source.geometry
    like = dense.layer(0).weight.detach()
    train = _images(source, source.read_training_sample, config.extract.samples, like)  # (m, D)
    test = _images(source, source.read_held_out, NUM_HELD_OUT, like)
    tuned_train, tuned_test = train, test  # what the layer is shown inside the tuned network
    untuned, tuned = (ExtractedStack(config.model.nonlinearity) for _ in range(2))
    layers: list[dict[str, Any]] = []
    fields: dict[str, Any] = {}
    for i in dense.indices:
        name, layer = layer_name(i), dense.layer(i)
        objective = replace(config.objective, l1=steered.get(name, config.objective.l1))
        judge = _Judge(objective, EfficientCoding(objective, dense.activation), flat)
        found = extract_layer(
            layer.weight, layer.bias, layer.num_units, geometry, train, config.extract, flat.tp
        )
        conv = found.layer
        tuned_conv = copy.deepcopy(conv, {id(shared): shared for shared in conv.buffers()})
        figures = {"name": name, "lambda": objective.l1, **_describe(layer, found, flat.tp)}
        log.info(
            "extract %s: %d units, %d kernels of side %d, %s padding, %.0f %% left over; tuning %d steps",
            *(name, layer.num_units, len(found.lattices), conv.side, found.padding),
            *(100 * figures["left_over_fraction"], config.tune.steps),
        )
        with torch.enable_grad():
            tune(
                tuned_conv,
                judge.objective,
                objective.l1,
                config.tune,
                _tuning_inputs(config, source, tuned, flat, train),
                config.train.batch,
                flat.tp,
                progress=mesh.is_main,
            )
        figures |= judge.dense(layer, train, test)
        figures |= judge.likeness(layer, conv, test)
        figures["conv_r2_tuned"] = judge.likeness(layer, tuned_conv, test)["conv_r2"]
        figures |= judge.conv("conv_untuned", conv, test) | judge.conv(
            "conv", tuned_conv, tuned_test
        )
        layers.append(figures)
        found.fields |= {"input_y": conv.y, "input_x": conv.x}  # of each kernel's centre
        fields |= {f"{name}/{key}": value.cpu().numpy() for key, value in found.fields.items()}

        normaliser = dense.normaliser(i)
        if normaliser is None:
            untuned.append(conv)
            tuned.append(tuned_conv)
        else:
            mean = flat.tp.gather(normaliser.mean, layer.num_units)
            untuned.append(conv, mean, normaliser.scale)
            shown = dense.activation(in_pieces(tuned_conv, tuned_train))
            tuned.append(tuned_conv, *_moments(shown))
        if i + 1 in dense.indices:
            above = partial(tuned.inputs_of_next, name=name)
            tuned_train, tuned_test = (in_pieces(above, x) for x in (tuned_train, tuned_test))
            train, test = (
                dense.join(i + 1, dense.emit(i, in_pieces(layer, x))) for x in (train, test)
            )
            geometry = found.geometry
    if mesh.is_main:
        save(tuned, folder.extracted, {"run": config.run.name, "tuned_steps": config.tune.steps})
        save(untuned, folder.extracted / "untuned", {"run": config.run.name, "tuned_steps": 0})
        np.savez_compressed(folder.extracted / "analysis.npz", **fields)
    return {**layers[0], "layers": layers}


def _images(
    source: ImageSource, read: Callable[[int, range], Images], num: int, like: Tensor
) -> Tensor:
    """(num, D) standardised images, made in pieces, on the device and in the precision of ``like``.

    Each input's samples lie next to each other, as ``structure`` reads them: it needs no copy.
    """
    x = like.new_empty(len(source.geometry), num).T  # (num, D)
    for start in range(0, num, PIECE):
        rows = range(start, min(start + PIECE, num))
        x[rows.start : rows.stop] = source.standardise(read(num, rows).pixels.to(like.device))
    return x


def _moments(activations: Tensor) -> tuple[Tensor, Tensor]:
    """Each unit's mean, and one scale for the layer: what standardises it."""
    mean = activations.mean(0)
    return mean, (activations - mean).square().mean().sqrt().clamp(min=1e-6)


def _tuning_inputs(
    config: Config, source: ImageSource, below: ExtractedStack, mesh: Mesh, like: Tensor
) -> Callable[[int], Tensor]:
    """Step → own samples of a fresh training batch, as the layers extracted so far show it."""
    rows = mesh.tp.shard(config.train.batch)
    names = list(below.layers)

    def inputs(step: int) -> Tensor:
        # Steps after those of training: images that come again, noise that does not.
        step += config.train.steps
        x = source.batch(step, config.train.batch, rows).to(like)
        x = add_input_noise(x, config.data.input_noise_std, config.seed, step, rows)
        with torch.no_grad():
            for name in names:
                x = below.inputs_of_next(x, name)
        return x

    return inputs


def _describe(layer: DenseLayer, found: LayerExtraction, axis: Axis) -> dict[str, Any]:
    """What the layer's weights look like, over all its units, dead ones counted."""
    d, kernel, alive = layer.num_units, found.fields["kernel"], found.fields["alive"]
    num_weights = d * layer.num_inputs
    num_zeros = num_weights - int(axis.sum(layer.weight.count_nonzero()))
    placed = kernel >= 0
    pairs = torch.stack([found.fields[key] for key in ("kernel", "place_y", "place_x")], dim=1)

    def median(key: str) -> float | None:
        values = found.fields[key][alive]
        return float(values.median()) if len(values) else None

    radius = median("radius")
    return {
        "num_units": d,
        "num_inputs": layer.num_inputs,
        "zero_fraction": num_zeros / num_weights,
        "dead_fraction": 1 - float(alive.double().mean()),
        "median_radius": radius,
        "random_radius": found.random_radius,
        "radius_ratio": None if radius is None else radius / found.random_radius,
        "median_participation": median("participation"),
        "median_window_mass": median("window_mass"),
        "null_median_radius": median("null_radius"),
        "null_median_participation": median("null_participation"),
        "null_median_window_mass": median("null_window_mass"),
        "distinct_centre_fraction": len(torch.unique(pairs[placed], dim=0)) / d,
        "num_kernels": len(found.lattices),
        "left_over_fraction": float((alive & ~placed).double().mean()),
        "kernels": found.lattices,
        "num_channels": len(found.channels),
        "channels": [
            {
                "kernels": list(channel.kernels),
                "stride": [channel.lattice.stride_y, channel.lattice.stride_x],
                "coverage": channel.lattice.coverage,
                "num_units": channel.num_units,
            }
            for channel in found.channels
        ],
        "padding": found.padding,
        "num_weights_dense": num_weights + (0 if layer.bias is None else d),
        "num_nonzeros_dense": num_weights - num_zeros,
        "num_weights_conv": found.layer.num_weights,
    }


class _Judge:
    """Held-out figures of a layer, dense or extracted, each process with the units it holds."""

    def __init__(self, config: ObjectiveConfig, objective: EfficientCoding, mesh: Mesh) -> None:
        self.config, self.objective, self.axis = config, objective, mesh.tp
        self.layout = Layout(features=mesh.tp)
        self.l1 = config.l1

    def dense(self, layer: DenseLayer, train: Tensor, test: Tensor) -> dict[str, Any]:
        """The dense layer, and the controls beside it."""
        norm = magnitude(layer, self.axis)
        z = in_pieces(layer, test)  # (m, d/tp)
        value = held_out(self.objective, z, norm, self.l1, layer.num_units, self.layout)
        control = controls(self.config, train, test, layer.num_units)
        figures = self._named("dense", value) | {"whitening_gain": whitening_gain(value, control)}
        for name in ("identity", "zca"):
            figures |= self._named(name, getattr(control, name) if control else None)
        return figures

    def conv(self, name: str, layer: ExtractedLayer, test: Tensor) -> dict[str, Any]:
        """The extracted layer, whole on every process; L1 counts its weights unrolled."""
        norm = float(layer.unrolled_l1())
        value = held_out(self.objective, in_pieces(layer, test), norm, self.l1, layer.num_units)
        return self._named(name, value)

    def likeness(self, dense: DenseLayer, conv: ExtractedLayer, test: Tensor) -> dict[str, Any]:
        """R² of the dense units by the extracted ones: all units, and those with a whole window."""
        target = in_pieces(dense, test)  # (m, d/tp)
        own = slice(dense.units.start, dense.units.stop)
        interior, left_over = conv.interior[own], conv.kernel[own] < 0
        residual = target - in_pieces(lambda x: conv(x)[:, own], test)
        # A left-over unit is kept as it was; it is scored as if only its mean were known.
        residual[:, left_over] = (target - target.mean(0))[:, left_over]
        return {
            "conv_r2": explained(target, residual, self.layout),
            "conv_r2_interior": explained(target[:, interior], residual[:, interior], self.layout),
            "interior_fraction": float(conv.interior.double().mean()),
        }

    @staticmethod
    def _named(name: str, value: HeldOut | None) -> dict[str, Any]:
        return {
            f"heldout_rate_minus_power_{name}": value and value.rate_minus_power,
            f"heldout_objective_{name}": value and value.objective,
        }
