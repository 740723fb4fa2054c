"""Extracted layers on top of one another, and their two files: weights and a readable structure."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save_file
from torch import Tensor, nn

from dense2conv.files import write_atomically
from dense2conv.nonlinearities import nonlinearity as activation_of
from dense2conv.shapes import Geometry, ImageShape, InputError
from dense2conv.structure.emission import ExtractedLayer
from dense2conv.structure.lattice import Lattice

FORMAT = "dense2conv extracted network, version 1"
JSON_NAME, TENSORS_NAME = "module.json", "module.safetensors"


class Standardisation(nn.Module):
    """(a - mean) / scale: mean (d,), one scale for all units; both are fixed."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor | float) -> None:
        super().__init__()
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("scale", torch.as_tensor(scale).to(mean).detach().clone())

    def forward(self, activations: Tensor) -> Tensor:
        return (activations - self.mean) / self.scale


class ExtractedStack(nn.Module):
    """Layers named ``layer1``, ``layer2``, …; between two of them f(z), standardised.

    nonlinearity: identity, relu, abs, softshrink (threshold 0.5) or tanh. Raises InputError for
    another name.
    """

    def __init__(self, nonlinearity: str = "identity") -> None:
        super().__init__()
        self.activation = activation_of(nonlinearity)
        self.nonlinearity = nonlinearity
        self.layers = nn.ModuleDict()
        self.standardise = nn.ModuleDict()
        self.extra: dict[str, Any] = {}

    def append(
        self, layer: ExtractedLayer, mean: Tensor | None = None, scale: Tensor | float = 1.0
    ) -> ExtractedStack:
        """Put a layer on top; ``mean`` (d,) and ``scale`` standardise f(z) for the layer above it.

        Without a mean, the layer above reads f(z) as it is. Raises InputError if the layer does
        not read as many inputs as the one below has units, or the mean has another length.
        """
        if self.layers:
            below = self.layer(len(self.layers) - 1)
            if below.num_units != layer.num_inputs:
                raise InputError(
                    f"the new layer reads {layer.num_inputs} inputs, but the one below has "
                    f"{below.num_units} units; append layers from the bottom up"
                )
        if mean is not None and mean.shape != (layer.num_units,):
            raise InputError(
                f"mean is {tuple(mean.shape)}, but the layer has {layer.num_units} units; pass "
                "one mean a unit of the layer being appended"
            )
        name = f"layer{len(self.layers) + 1}"
        self.layers[name] = layer
        if mean is not None:
            self.standardise[name] = Standardisation(mean, scale)
        return self

    def layer(self, index: int) -> ExtractedLayer:
        """Layer ``index``, counted from 0."""
        layer = self.layers[f"layer{index + 1}"]
        assert isinstance(layer, ExtractedLayer)
        return layer

    def inputs_of_next(self, x: Tensor, name: str) -> Tensor:
        """What layer ``name``, given x (m, D), shows the layer above it: (m, d)."""
        return self._shown(self.layers[name](x), name)

    def _shown(self, z: Tensor, name: str) -> Tensor:
        activations = self.activation(z)
        if name in self.standardise:
            return self.standardise[name](activations)
        return activations

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(m, D) → the linear output z (m, d) of every layer, by name."""
        outputs: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            z = outputs[name] = layer(x)
            if len(outputs) < len(self.layers):
                x = self._shown(z, name)
        return outputs


def save(stack: ExtractedStack, folder: Path | str, extra: dict[str, Any] | None = None) -> None:
    """Write ``module.safetensors`` and ``module.json`` into ``folder``, which is made if need be.

    Each file appears whole or not at all; the json comes last and carries the hash of the other.
    ``extra`` is anything json can hold, given back as ``stack.extra``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in stack.state_dict().items()}
    write_atomically(folder / TENSORS_NAME, partial(save_file, tensors))
    with (folder / TENSORS_NAME).open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    structure = {
        "format": FORMAT,
        "tensors": TENSORS_NAME,
        "sha256": checksum,
        "nonlinearity": stack.nonlinearity,
        "layers": {name: _structure(layer) for name, layer in stack.layers.items()},
        "standardised": list(stack.standardise),
        "extra": extra or {},
    }
    write_atomically(folder / JSON_NAME, json.dumps(structure, indent=2, ensure_ascii=False))


def _structure(layer: nn.Module) -> dict[str, Any]:
    assert isinstance(layer, ExtractedLayer)
    shape = layer.shape
    return {
        "num_inputs": layer.num_inputs,
        "num_units": layer.num_units,
        "num_weights": layer.num_weights,
        "grid": {"channels": shape.channels, "height": shape.height, "width": shape.width},
        "side": layer.side,
        "padding": layer.padding,
        "bias": layer.bias is not None,
        "kernels": [
            {
                "stride": [k.stride_y, k.stride_x],
                "offset": [k.offset_y, k.offset_x],
                "coverage": k.coverage,
            }
            for k in layer.lattices
        ],
        "kernels_of_conv": layer.kernels_of_conv,
    }


def load(path: Path | str) -> ExtractedStack:
    """The network that :func:`save` wrote; ``path`` is its folder or its json file.

    On the CPU, bit for bit, in the precision it was trained in. Raises InputError, with the file and
    what to do, if a file is missing, damaged or from another save.
    """
    path = Path(path)
    path = path / JSON_NAME if path.is_dir() else path
    remedy = "extract again, or give the folder of a finished extraction"
    try:
        structure = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as json: {error}; {remedy}") from error
    if not isinstance(structure, dict) or structure.get("format") != FORMAT:
        raise InputError(f"{path} is not a {FORMAT!r} file; {remedy}")
    payload_path = path.parent / TENSORS_NAME
    try:
        payload = payload_path.read_bytes()
    except OSError as error:
        raise InputError(f"{payload_path} cannot be read: {error}; {remedy}") from error
    if hashlib.sha256(payload).hexdigest() != structure.get("sha256"):
        raise InputError(
            f"{payload_path} is damaged, or not the one that {path} describes; {remedy}"
        )
    try:
        return _build(structure, tensors_from_bytes(payload))
    except (
        AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, SafetensorError,
    ) as error:  # fmt: skip
        raise InputError(f"{path} does not fit {payload_path}: {error}; {remedy}") from error


def _build(structure: dict[str, Any], tensors: dict[str, Tensor]) -> ExtractedStack:
    stack = ExtractedStack(structure["nonlinearity"])
    for i, (name, described) in enumerate(structure["layers"].items()):
        if name != f"layer{i + 1}":
            raise ValueError(f"layers are not in order at {name!r}")
        layer = _build_layer(described, _under(tensors, f"layers.{name}."))
        mean, scale = (
            (tensors[f"standardise.{name}.mean"], tensors[f"standardise.{name}.scale"])
            if name in structure["standardised"]
            else (None, 1.0)
        )
        stack.append(layer, mean, scale)
    built = stack.state_dict()
    odd = sorted(built.keys() ^ tensors.keys())
    odd += [name for name in built if name not in odd and built[name].shape != tensors[name].shape]
    if odd:
        raise ValueError(f"only one of the two knows {', '.join(odd[:3])}")
    stack.load_state_dict(tensors)
    stack.extra = structure["extra"]
    return stack


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _build_layer(described: dict[str, Any], tensors: dict[str, Tensor]) -> ExtractedLayer:
    side, lattices = described["side"], []
    for entry in described["kernels"]:
        (stride_y, stride_x), (offset_y, offset_x) = entry["stride"], entry["offset"]
        if min(stride_y, stride_x) < 1 or min(offset_y, offset_x) < 0:
            raise ValueError(f"stride {entry['stride']} from {entry['offset']}")
        lattices.append(Lattice(stride_y, stride_x, offset_y, offset_x, entry["coverage"]))
    shape = ImageShape(**described["grid"])
    gain_on_kernel, kernel = tensors["gain"], tensors["kernel"]
    kernels = gain_on_kernel.new_zeros(len(lattices), shape.channels, side, side)
    for i, members in enumerate(described["kernels_of_conv"]):
        kernels[members] = tensors[f"convs.{i}.weight"]
    gain = gain_on_kernel.new_zeros(len(kernel))
    gain[kernel >= 0] = gain_on_kernel
    return ExtractedLayer(
        Geometry(shape, tensors["channel_of_input"], tensors["y_of_input"], tensors["x_of_input"]),
        kernels, lattices, described["padding"], kernel, tensors["y"], tensors["x"], gain,
        tensors["left_unit"], tensors["left_input"], tensors["left_value"],
        tensors["bias"] if described["bias"] else None,
    )  # fmt: skip
