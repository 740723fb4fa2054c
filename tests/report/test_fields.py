"""Fields on their grids: where a weight is drawn, which units are shown, what is told of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file

from dense2conv.data.source import pixel_order
from dense2conv.report.fields import STEPS, on_grid, read_fields, shrunk
from dense2conv.report.run_folder import RunFolder
from dense2conv.shapes import Geometry, ImageShape
from tests.report.run_folders import write_run

RNG = np.random.default_rng(0)


def save_snapshot(folder: Path, name: str, weight: np.ndarray, units: np.ndarray) -> None:
    (folder / "fields").mkdir(parents=True, exist_ok=True)
    np.savez(folder / "fields" / f"{name}.npz", weight=weight, units=units)


def test_the_strongest_of_the_inputs_at_a_place_is_drawn() -> None:
    def places(values: list[int]) -> torch.Tensor:
        return torch.tensor(values)

    geometry = Geometry(
        ImageShape(3, 1, 2), places([0, 1, 2, -1]), places([0, 0, 0, 0]), places([1, 1, 1, 0])
    )
    weight = np.array([[1.0, -3.0, 2.0, 9.0], [0.0, 0.0, np.nan, 9.0]])
    drawn = on_grid(weight, geometry, in_colour=False)
    assert drawn.shape == (2, 1, 1, 2)
    np.testing.assert_array_equal(drawn[:, 0, 0], [[0.0, -3.0], [0.0, np.nan]])


def test_colours_keep_their_channels() -> None:
    shape = ImageShape(3, 2, 4)
    weight = RNG.normal(size=(2, shape.numel))
    drawn = on_grid(weight, Geometry.of_image(shape), in_colour=True)
    np.testing.assert_array_equal(drawn, weight.reshape(2, 3, 2, 4))


def test_shrinking_keeps_the_strongest_of_a_block() -> None:
    tile = np.zeros((1, 1, 3, 5))
    tile[0, 0, 2, 4], tile[0, 0, 0, 0], tile[0, 0, 1, 1] = -7.0, 1.0, 2.0
    np.testing.assert_array_equal(shrunk(tile, 2)[0, 0], [[2.0, 0.0, 0.0], [0.0, 0.0, -7.0]])


def test_figures_are_those_of_the_tile_they_stand_beside(tmp_path: Path) -> None:
    weight = np.zeros((5, 16))
    for unit, place in enumerate([9, 2, 2, 14]):
        weight[unit, place] = -1.0 - unit  # and unit 4 is dead
    save_snapshot(tmp_path, "layer1_step00000000", RNG.normal(size=(5, 16)), np.arange(5) * 10)
    save_snapshot(tmp_path, "layer1_step00000009", weight, np.arange(5) * 10)
    fields = read_fields(RunFolder.read(tmp_path), "layer1")
    assert fields is not None
    last = fields.sheets[-1].figures
    pixels = np.asarray(fields.sheets[-1].image)
    for i, unit in enumerate(fields.units):
        row, column = divmod(i, fields.columns)
        tile = pixels[row * 17 :, column * 17 :][:16:4, :16:4]  # four pixels a weight
        assert last["alive"][i] == (unit != 40)
        if unit == 40:
            assert (tile == 247).all()
            continue
        place = (last["y"][i], last["x"][i])
        assert place == divmod([9, 2, 2, 14][unit // 10], 4)
        assert tile[place].tolist() == [5, 48, 97]  # the negative end, at that place
        assert last["largest"][i] == 1.0 + unit // 10
        assert (last["radius"][i], last["zero"][i]) == (0.0, 15 / 16)


def test_permuted_pixels_are_drawn_where_they_came_from(tmp_path: Path) -> None:
    config = {"data": {"side": 4, "channels": 1, "permute_pixels": True}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    weight = np.zeros((1, 16))
    weight[0, 5] = 1.0
    save_snapshot(tmp_path, "layer1_step00000001", weight, np.arange(1))
    fields = read_fields(RunFolder.read(tmp_path), "layer1")
    assert fields is not None
    figures = fields.sheets[0].figures
    assert figures["y"][0] * 4 + figures["x"][0] == int(pixel_order(16)[5])


@pytest.mark.parametrize(("side", "channels"), [(16, 1), (64, 3), (224, 3)])
def test_many_units_and_steps_are_sampled(tmp_path: Path, side: int, channels: int) -> None:
    num, inputs = (3000, 256) if side == 16 else (40, channels * side**2)
    weight = RNG.normal(size=(num, inputs)).astype(np.float32)
    for step in range(STEPS + 5 if side == 16 else 1):
        save_snapshot(tmp_path, f"layer1_step{step:08d}", weight, np.arange(num) * 4)
    config = {"data": {"side": side, "channels": channels}, "model": {"widths": [12288]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    fields = read_fields(RunFolder.read(tmp_path), "layer1")
    assert fields is not None
    assert len(fields.sheets) == (STEPS if side == 16 else 1)
    assert "of 12\u202f288" in fields.note
    assert fields.in_colour == (channels == 3)
    height, width = fields.tile
    assert len(fields.units) * height * width * channels <= 300_000
    assert max(fields.tile) <= 64
    assert ("strongest of 4 × 4" in fields.note) == (side == 224)


def test_no_common_unit_or_grid_gives_no_pictures(tmp_path: Path) -> None:
    save_snapshot(tmp_path, "layer1_step00000000", np.ones((2, 9)), np.array([0, 1]))
    save_snapshot(tmp_path, "layer1_step00000001", np.ones((2, 9)), np.array([2, 3]))
    save_snapshot(tmp_path, "layer2_step00000000", np.ones((2, 9)), np.array([0, 1]))
    run = RunFolder.read(tmp_path)
    assert read_fields(run, "layer1") is None  # no unit is in both
    assert read_fields(run, "layer2") is None  # the layer below was not analysed


def test_kernels_come_in_their_own_order(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    banks = {f"layers.layer1.convs.{i}.weight": np.full((1, 1, 3, 3), i, "f4") for i in range(11)}
    save_file(banks, folder / "extracted" / "module.safetensors")
    kernels = RunFolder.read(folder).kernels["layer1"]
    assert kernels[:, 0, 0, 0].tolist() == list(range(11))
    order = [[10], [9], [8], [7], [6], [5], [4], [3], [2], [1], [0]]
    (folder / "extracted" / "module.json").write_text(
        f'{{"layers": {{"layer1": {{"kernels_of_conv": {order}}}}}}}'
    )
    kernels = RunFolder.read(folder).kernels["layer1"]
    assert kernels[:, 0, 0, 0].tolist() == list(range(10, -1, -1))
