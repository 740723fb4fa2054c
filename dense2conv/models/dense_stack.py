"""A stack of dense layers that knows nothing of ranks: it is told which units it holds.

m   samples     D   inputs of a layer     d   units of a layer     d/tp   units held here
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dense2conv.nonlinearities import nonlinearity
from dense2conv.rng import INIT, normal_blocks
from dense2conv.shapes import SINGLE, WHOLE, Axis, InputError, Layout


@dataclass
class ModelConfig:
    """The dense network."""

    widths: list[int] = field(
        default_factory=lambda: [256, 128],
        metadata={"help": "units of each layer, first to last"},
    )
    nonlinearity: str = field(
        default="abs", metadata={"help": "identity | relu | abs | softshrink | tanh"}
    )
    bias: bool = field(default=False, metadata={"help": "give every unit a bias"})
    standardise: bool = field(
        default=True,
        metadata={"help": "between layers: subtract each unit's mean, divide by one scale a layer"},
    )
    init_scale: float = field(
        default=0.3, metadata={"help": "weights start as this times N(0, 1/inputs)"}
    )

    def validate(self) -> None:
        """Raise InputError where a field cannot be."""
        if not self.widths or min(self.widths) < 1:
            raise InputError(
                f"model.widths={self.widths}; give one positive number of units a layer, "
                "e.g. model.widths=[256,128]"
            )
        if self.init_scale <= 0:
            raise InputError(f"model.init_scale={self.init_scale}; use a positive number")
        nonlinearity(self.nonlinearity)


class DenseLayer(nn.Module):
    """The rows ``units`` of one dense layer: z = x Wᵀ + b.

    Args:
        num_inputs: D.
        num_units: d, of the whole layer.
        units: which of them this module holds.
        bias: whether units have a bias.
        dtype: of the weights.
    """

    mask: Tensor | None

    def __init__(
        self,
        num_inputs: int,
        num_units: int,
        units: range,
        bias: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_inputs, self.num_units, self.units = num_inputs, num_units, units
        self.weight = nn.Parameter(torch.empty(len(units), num_inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(len(units), dtype=dtype)) if bias else None
        self.register_buffer("mask", None)

    @torch.no_grad()
    def init(self, seed: int, index: int, scale: float) -> None:
        """Fill the own rows: the same numbers whichever units the module holds."""
        std = scale / self.num_inputs**0.5
        for rows, values in normal_blocks((seed, INIT, index), self.units, self.num_inputs):
            self.weight[rows].copy_(values.mul_(std))
        if self.bias is not None:
            self.bias.zero_()

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Keep only the weights where ``mask`` (d/tp, D) is True, now and after every step."""
        self.mask = mask
        self.apply_mask()

    @torch.no_grad()
    def apply_mask(self) -> None:
        """Zero the pruned weights again."""
        if self.mask is not None:
            self.weight.masked_fill_(~self.mask, 0)  # a product would widen the whole mask

    def forward(self, x: Tensor, columns: Axis = WHOLE) -> Tensor:
        """The output (m, d/tp) for inputs (m, D), whose columns may be spread over an axis."""
        return columns.linear(x, self.weight, self.bias, self.num_units)


class Standardise(nn.Module):
    """(a - mean) / scale: a running mean a unit, one running scale for the whole layer.

    One scale, since a scale a unit would blow up dead units and hide that kernels differ. The
    running figures are whole-batch ones and already include the batch they are applied to, so the
    first batch is standardised by itself; they are constants to the gradient.
    """

    mean: Tensor
    scale: Tensor
    num_batches: Tensor
    momentum = 0.01

    def __init__(self, num_units: int, num_held: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.num_units = num_units
        self.register_buffer("mean", torch.empty(num_held, dtype=dtype))
        self.register_buffer("scale", torch.empty((), dtype=dtype))
        self.register_buffer("num_batches", torch.empty((), dtype=dtype))

    @torch.no_grad()
    def init(self) -> None:
        """Forget every batch."""
        self.mean.zero_()
        self.scale.fill_(1)
        self.num_batches.zero_()

    @torch.no_grad()
    def update(self, activations: Tensor, num_samples: int, layout: Layout = SINGLE) -> None:
        """Take a whole batch into account, of which ``activations`` (m/dp, d/tp) is held here."""
        a = activations.double()
        moments = torch.cat([a.sum(0), a.square().sum().reshape(1)])  # (d/tp + 1,)
        moments = layout.samples.sum(moments) / num_samples
        mean, second = moments[:-1], moments[-1]
        variance = layout.features.sum(second - mean.square().sum()) / self.num_units
        self.num_batches += 1
        weight = torch.clamp(1 / self.num_batches, min=self.momentum)
        self.mean.lerp_(mean.to(self.mean), weight)
        self.scale.lerp_(variance.clamp(min=1e-12).sqrt().to(self.scale), weight)

    def forward(self, activations: Tensor) -> Tensor:
        return (activations - self.mean) / self.scale


class DenseStack(nn.Module):
    """Layers ``layers`` of a dense network, and in each the units that ``layout`` gives this
    process.

    Args:
        num_inputs: pixels of an image.
        config: widths, non-linearity and the rest.
        layout: which units are held; the default holds all.
        layers: which layers are held (a pipeline stage); the default holds all.
        dtype: of the weights.
        rows: what the rows of weights and biases are spread over; the default is what units are,
            ``layout.features``. Where it splits those further, ``forward`` is not for this module
            alone: an engine brings the rows of a share together.
    """

    def __init__(
        self,
        num_inputs: int,
        config: ModelConfig,
        layout: Layout = SINGLE,
        layers: range | None = None,
        dtype: torch.dtype = torch.float32,
        rows: Axis | None = None,
    ) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        self.rows = layout.features if rows is None else rows
        self.num_layers = len(config.widths)
        self.indices = range(self.num_layers) if layers is None else layers
        self.activation = nonlinearity(config.nonlinearity)
        inputs = [num_inputs, *config.widths]
        self.layers = nn.ModuleDict()
        self.standardise = nn.ModuleDict()
        for i in self.indices:
            width, name = config.widths[i], layer_name(i)
            units = self.rows.shard(width)
            self.layers[name] = DenseLayer(inputs[i], width, units, config.bias, dtype)
            if config.standardise and i < self.num_layers - 1:
                num_shown = len(layout.features.shard(width))
                self.standardise[name] = Standardise(width, num_shown, dtype)

    def init(self, seed: int) -> DenseStack:
        """Fill all weights from ``seed``, the same numbers on any mesh."""
        for i in self.indices:
            self.layer(i).init(seed, i, self.config.init_scale)
            normaliser = self.normaliser(i)
            if normaliser is not None:
                normaliser.init()
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.layer(self.indices[0]).weight.dtype

    def layer(self, index: int) -> DenseLayer:
        """Layer ``index``, counted from 0 over the whole network."""
        layer = self.layers[layer_name(index)]
        assert isinstance(layer, DenseLayer)
        return layer

    def normaliser(self, index: int) -> Standardise | None:
        """The standardisation behind layer ``index``, if there is one."""
        name = layer_name(index)
        return self.standardise[name] if name in self.standardise else None  # type: ignore[return-value]

    def emit(self, index: int, z: Tensor) -> Tensor:
        """What layer ``index`` shows the next one, own units only: f(z), standardised."""
        a = self.activation(z)
        normaliser = self.normaliser(index)
        return a if normaliser is None else normaliser(a)  # (m, d/tp)

    def join(self, index: int, shown: Tensor) -> Tensor:
        """The input of layer ``index``, from the shards of what the layer below shows."""
        return self.layout.features.gather(shown, self.layer(index).num_inputs, dim=1)  # (m, D)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The linear output z (m, d/tp) of every held layer by name; x is (m, D) of the first."""
        outputs: dict[str, Tensor] = {}
        for i in self.indices:
            columns = WHOLE if i == self.indices[0] else self.layout.features
            z = outputs[layer_name(i)] = self.layer(i)(x, columns)
            if i + 1 in self.indices:
                x = self.emit(i, z)
        return outputs


def layer_name(index: int) -> str:
    """``layer1`` for index 0: layers are named from 1, as people count them."""
    return f"layer{index + 1}"
