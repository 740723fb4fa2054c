"""The module against the dense matrix it stands for; files that come back bit for bit, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dense2conv.shapes import Geometry, ImageShape, InputError
from dense2conv.structure import ExtractedLayer, ExtractedStack, Lattice, load, save
from tests.structure.planted import generator

PADDINGS = ["none", "zeros", "reflect", "replicate", "circular"]


def random_layer(
    padding: str, side: int = 3, channels: int = 2, seed: int = 0, bias: bool = True
) -> ExtractedLayer:
    """Two kernels on different lattices, left-over and dead units, shared, empty and no places."""
    g = generator(seed)
    shape = ImageShape(channels, 6, 7)
    image = Geometry.of_image(shape)
    extra = torch.randint(shape.numel, (4,), generator=g)
    order = torch.cat([torch.randperm(shape.numel, generator=g)[3:], extra])
    channel = image.channel[order].clone()
    channel[5] = -1
    geometry = Geometry(shape, channel, image.y[order], image.x[order])
    d, margin = 20, side // 2 if padding == "none" else 0
    lattices = [
        Lattice(1, 1, margin, margin, 1.0),
        Lattice(2, 1, margin, margin, 0.5),
        Lattice(1, 1, margin + 1, margin, 0.5),
    ]
    kernel = torch.randint(-1, 3, (d,), generator=g)
    kernel[:5] = torch.tensor([0, 1, 2, -1, -1])
    y = torch.randint(margin + 1, 6 - margin, (d,), generator=g)
    y = torch.where(kernel == 1, margin + (y - margin) // 2 * 2, y)
    x = torch.randint(margin, 7 - margin, (d,), generator=g)
    left_unit = torch.tensor([3, 3, 3])
    left_input = torch.tensor([0, 5, 9])
    normal = {"generator": g, "dtype": torch.float64}
    return ExtractedLayer(
        geometry, torch.randn(3, channels, side, side, **normal), lattices, padding, kernel, y, x,
        torch.randn(d, **normal), left_unit, left_input, torch.randn(3, **normal),
        torch.randn(d, **normal) if bias else None,
    )  # fmt: skip


def dense_of(layer: ExtractedLayer) -> Tensor:
    """(d, D): the module on every basis vector, less its bias."""
    identity = torch.eye(layer.num_inputs, dtype=torch.float64)
    z = layer(identity)
    return (z if layer.bias is None else z - layer.bias).T.detach()


def slow_row(layer: ExtractedLayer, unit: int) -> Tensor:
    """One dense row, one tap at a time, padding by hand."""
    row = torch.zeros(layer.num_inputs, dtype=torch.float64)
    k, half = int(layer.kernel[unit]), layer.side // 2
    height, width = layer.shape.height, layer.shape.width
    if k < 0:
        for u, j, v in zip(layer.left_unit, layer.left_input, layer.left_value, strict=True):
            row[j] += v.detach() * (u == unit)
        return row

    def inside(p: int, size: int) -> int | None:
        if 0 <= p < size:
            return p
        return {
            "reflect": -p if p < 0 else 2 * (size - 1) - p,
            "replicate": 0 if p < 0 else size - 1,
            "circular": p % size,
        }.get(layer.padding)

    gain = layer.gain[int((layer.kernel[:unit] >= 0).sum())]
    for c in range(layer.shape.channels):
        for i in range(layer.side):
            for j in range(layer.side):
                y = inside(int(layer.y[unit]) + i - half, height)
                x = inside(int(layer.x[unit]) + j - half, width)
                if y is None or x is None:
                    continue
                here = (layer.channel_of_input == c) & (layer.y_of_input == y)
                row[here & (layer.x_of_input == x)] += (
                    gain * layer.kernel_bank()[k, c, i, j]
                ).detach()
    return row


@pytest.mark.parametrize("side", [1, 3, 5])
@pytest.mark.parametrize("padding", PADDINGS)
def test_module_unrolled_rows_and_l1_agree(padding: str, side: int) -> None:
    layer = random_layer(padding, side)
    dense = dense_of(layer)
    slow = torch.stack([slow_row(layer, unit) for unit in range(layer.num_units)])
    torch.testing.assert_close(dense, slow)
    units = torch.tensor([3, 0, 19, 4, 1])
    torch.testing.assert_close(layer.unrolled_rows(units), dense[units])
    assert float(layer.unrolled_l1().detach()) == pytest.approx(float(dense.abs().sum()), rel=1e-12)
    assert float(dense[4].abs().sum()) == 0  # dead
    half = side // 2
    y, x = layer.y, layer.x
    expected = (y >= half) & (y < 6 - half) & (x >= half) & (x < 7 - half) & (layer.kernel >= 0)
    assert torch.equal(layer.interior, expected)
    on = int((layer.kernel >= 0).sum())
    assert layer.num_weights == 3 * 2 * side**2 + on + 3 + 20


@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate"])
def test_gradients(padding: str) -> None:
    layer = random_layer(padding, side=5, channels=1, bias=False)
    names = [name for name, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    x = torch.randn(3, layer.num_inputs, generator=generator(1), dtype=torch.float64)

    def l1(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(_L1(layer), _named(names, parameters), ())

    def z(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(l1, values)
    assert torch.autograd.gradcheck(z, values)


class _L1(torch.nn.Module):
    def __init__(self, layer: ExtractedLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.unrolled_l1()


def _named(names: list[str], values: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"layer.{name}": value for name, value in zip(names, values, strict=True)}


def test_kernels_of_one_lattice_share_a_convolution() -> None:
    layer = random_layer("zeros")
    assert layer.kernels_of_conv == [[0, 2], [1]]
    assert [conv.stride for conv in layer.convs] == [(1, 1), (2, 1)]


def two_layers(nonlinearity: str = "abs") -> ExtractedStack:
    first = random_layer("reflect", seed=1)
    grid = ImageShape(1, 4, 5)
    lattice = [Lattice(1, 1, 0, 0, 1.0)]
    kernels = torch.randn(1, 1, 3, 3, generator=generator(2), dtype=torch.float64)
    none = torch.zeros(0, dtype=torch.int64)
    place = torch.arange(12)
    second = ExtractedLayer(
        Geometry.of_image(grid), kernels, lattice, "zeros", torch.zeros(12).long(), place % 4,
        place % 5, torch.ones(12).double(), none, none, none.double(),
    )  # fmt: skip
    stack = ExtractedStack(nonlinearity)
    return stack.append(first, torch.linspace(-1, 1, 20).double(), 1.7).append(second)


@pytest.mark.parametrize("nonlinearity", ["identity", "relu", "abs", "softshrink", "tanh"])
def test_stack_puts_the_nonlinearity_and_standardisation_between_layers(nonlinearity: str) -> None:
    stack = two_layers(nonlinearity)
    f = {
        "identity": lambda z: z, "relu": torch.relu, "abs": torch.abs, "tanh": torch.tanh,
        "softshrink": torch.nn.functional.softshrink,
    }[nonlinearity]  # fmt: skip
    x = torch.randn(6, stack.layer(0).num_inputs, generator=generator(3), dtype=torch.float64)
    z1 = stack.layer(0)(x)
    shown = (f(z1) - torch.linspace(-1, 1, 20).double()) / 1.7
    outputs = stack(x)
    assert list(outputs) == ["layer1", "layer2"]
    torch.testing.assert_close(outputs["layer1"], z1)
    torch.testing.assert_close(stack.inputs_of_next(x, "layer1"), shown)
    torch.testing.assert_close(outputs["layer2"], stack.layer(1)(shown))


def test_save_and_load_give_the_same_bits(tmp_path: Path) -> None:
    stack = two_layers()
    save(stack, tmp_path / "deep" / "folder", {"run": "retina", "steps": 3})
    x = torch.randn(6, stack.layer(0).num_inputs, generator=generator(3), dtype=torch.float64)
    for path in (tmp_path / "deep" / "folder", str(tmp_path / "deep" / "folder" / "module.json")):
        again = load(path)
        assert again.extra == {"run": "retina", "steps": 3}
        ours, theirs = stack.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(theirs[name], ours[name]), name
            assert theirs[name].dtype == ours[name].dtype
        for name, z in stack(x).items():
            assert torch.equal(again(x)[name], z)
        assert torch.equal(again.layer(0).unrolled_l1(), stack.layer(0).unrolled_l1())
        assert again.layer(0).lattices == stack.layer(0).lattices
    names = {p.name for p in (tmp_path / "deep" / "folder").iterdir()}
    assert names == {"module.json", "module.safetensors"}


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "no json": lambda p: (p / "module.json").unlink(),
    "half a json": lambda p: (p / "module.json").write_text('{"format": '),
    "other json": lambda p: (p / "module.json").write_text("[1, 2]"),
    "not text": lambda p: (p / "module.json").write_bytes(b"\xff\xfe\x00"),
    "no tensors": lambda p: (p / "module.safetensors").unlink(),
    "cut tensors": lambda p: (p / "module.safetensors").write_bytes(
        (p / "module.safetensors").read_bytes()[:-9]
    ),
    "one layer gone": lambda p: _edit(p / "module.json", layers={}),
    "other function": lambda p: _edit(p / "module.json", nonlinearity="sine"),
    "no layers": lambda p: _edit(p / "module.json", layers=None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named_with_a_remedy(tmp_path: Path, damage: str) -> None:
    save(two_layers(), tmp_path)
    DAMAGE[damage](tmp_path)
    with pytest.raises(InputError, match=r"module\.(json|safetensors).*extract again"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("padding", "same"), ("padding", "none"), ("side", 5), ("num_units", None),
        ("kernels", []), ("grid", {"channels": 2, "height": 5, "width": 7}), ("bias", False),
        ("kernels_of_conv", [[0, 7], [1]]),
    ],
)  # fmt: skip
def test_structure_that_contradicts_the_tensors(tmp_path: Path, key: str, value: object) -> None:
    save(two_layers(), tmp_path)
    path = tmp_path / "module.json"
    layers = json.loads(path.read_text())["layers"]
    layers["layer1"][key] = value
    _edit(path, layers=layers)
    if key == "num_units":  # for the reader only
        load(tmp_path)
        return
    with pytest.raises(InputError, match=r"does not fit .*module\.safetensors"):
        load(tmp_path)


def test_contradictions_are_refused() -> None:
    stack = two_layers()
    with pytest.raises(InputError, match="from the bottom up"):
        stack.append(random_layer("zeros"))
    with pytest.raises(InputError, match="one mean a unit"):
        ExtractedStack().append(random_layer("zeros"), torch.zeros(3))
    with pytest.raises(InputError, match="unknown"):
        ExtractedStack("sine")
    geometry, none = Geometry.of_image(ImageShape(1, 3, 9)), torch.zeros(0).long()
    with pytest.raises(InputError, match="reflect padding by 3 needs more than 3 places"):
        ExtractedLayer(
            geometry, torch.ones(1, 1, 7, 7), [Lattice(1, 1, 0, 0, 1.0)], "reflect", none, none,
            none, none.float(), none, none, none.float(),
        )  # fmt: skip
