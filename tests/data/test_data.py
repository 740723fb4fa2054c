"""Batches are a pure function of (seed, step), whoever reads which rows."""

import hashlib
import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dense2conv.data import DataConfig, add_input_noise, open_source
from dense2conv.data.photographs import (
    COLOUR_HELD_OUT,
    COLOUR_TRAIN,
    GREY_HELD_OUT,
    GREY_TRAIN,
    load_photographs,
)
from dense2conv.rng import normal_rows
from dense2conv.shapes import InputError
from tests.data.test_decode import encoded, photograph, png_of_size


@pytest.fixture(scope="module")
def natural():
    return open_source(DataConfig(side=8), seed=0)


def test_any_rows_of_a_batch_are_rows_of_the_whole_batch(natural):
    whole = natural.batch(7, 100, range(100))
    noisy = add_input_noise(whole, 0.1, 0, 7, range(100))
    for rows in (range(0, 50), range(50, 100), range(33, 71), range(99, 100), range(5, 5)):
        part = natural.batch(7, 100, rows)
        assert torch.equal(part, whole[rows.start : rows.stop])
        assert torch.equal(add_input_noise(part, 0.1, 0, 7, rows), noisy[rows.start : rows.stop])


def test_steps_seeds_and_splits_differ(natural):
    other = open_source(DataConfig(side=8), seed=1)
    rows = range(64)
    batches = [natural.batch(0, 64, rows), natural.batch(1, 64, rows), other.batch(0, 64, rows)]
    assert not any(torch.equal(a, b) for a in batches for b in batches if a is not b)
    assert torch.equal(natural.held_out(32), other.held_out(32))
    assert not torch.equal(natural.held_out(32), natural.training_sample(32))


def test_pixels_are_standardised(natural):
    x = natural.training_sample(20_000)
    assert abs(float(x.mean())) < 0.05
    assert abs(float(x.std()) - 1) < 0.05


def test_a_patch_is_cut_out_of_its_photograph():
    config = DataConfig(side=9, channels=3)
    photographs = load_photographs(config).train
    source = open_source(config, seed=4)
    mean = np.mean([p.reshape(-1, 3).mean(0) for p in photographs], axis=0)
    x = source.batch(0, 3, range(3)).double()
    std = float(source.std)
    patch = (x[1].view(3, 9, 9).permute(1, 2, 0).numpy() * std + mean).round().astype(int)
    windows = (
        np.lib.stride_tricks.sliding_window_view(p, (9, 9), axis=(0, 1)) for p in photographs
    )
    found = [
        bool((w[..., 4, 4] == patch[4, 4]).all(-1).any())
        and bool((w.transpose(0, 1, 3, 4, 2) == patch).all((2, 3, 4)).any())
        for w in windows
    ]
    assert any(found)


def test_no_photograph_is_on_both_sides():
    assert not set(GREY_TRAIN) & set(GREY_HELD_OUT)
    assert not set(COLOUR_TRAIN) & set(COLOUR_HELD_OUT)
    assert "motorcycle_right.png" not in GREY_TRAIN + GREY_HELD_OUT


def test_permuted_pixels_know_where_they_came_from():
    config = DataConfig(side=6)
    plain = open_source(config, seed=0)
    permuted = open_source(DataConfig(side=6, permute_pixels=True), seed=0)
    x, y = plain.batch(0, 4, range(4)), permuted.batch(0, 4, range(4))
    assert not torch.equal(x, y)
    where = permuted.geometry.y * 6 + permuted.geometry.x
    assert torch.equal(y, x[:, where])


def test_random_rows_do_not_depend_on_who_asks():
    whole = normal_rows((5, 1), range(300), 7)
    assert torch.equal(normal_rows((5, 1), range(100, 201), 7), whole[100:201])
    assert normal_rows((5, 1), range(0), 7).shape == (0, 7)
    assert abs(float(whole.std()) - 1) < 0.1


def _picture(path, size=(40, 30), mode="RGB"):
    pixels = np.random.default_rng(len(path.name)).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def test_a_folder_of_images_of_many_kinds(tmp_path):
    (tmp_path / "deep").mkdir()
    _picture(tmp_path / "a.png", mode="L")
    _picture(tmp_path / "b.jpg", mode="CMYK")
    _picture(tmp_path / "deep" / "c.gif", mode="P")
    _picture(tmp_path / "tiny.png", size=(4, 4))
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "notes.txt").write_text("not one either")
    source = open_source(DataConfig(kind="folder", root=str(tmp_path), side=8), seed=0)
    assert source.batch(0, 5, range(5)).shape == (5, 64)
    assert source.held_out(5).isfinite().all()


def test_a_folder_of_broken_and_odd_pictures_gives_those_that_can_be_used(tmp_path, monkeypatch):
    good = photograph(24, 24)
    ramp = np.linspace(0, 65535, 24 * 24).astype(np.uint16).reshape(24, 24)
    broken = {
        "empty.jpg": b"",
        "text.jpg": b"not a picture",
        "cut.jpg": encoded(photograph(200, 300))[:-500],
        "cut.png": encoded(good, "PNG")[:300],
        "huge.png": png_of_size(20_000, 20_000),
        "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\n",
        "tiny.png": encoded(photograph(1, 1), "PNG"),
    }
    usable = {
        "cmyk.jpg": encoded(good, mode="CMYK", quality=95),
        "palette.png": encoded(good, "PNG", mode="P"),
        "sixteen.png": encoded(ramp, "PNG"),
        "turned.jpg": encoded(good, quality=95),
    }
    for name, data in (broken | usable).items():
        (tmp_path / name).write_bytes(data)
    config = DataConfig(kind="folder", root=str(tmp_path), side=8)
    said = []
    logger = logging.getLogger("dense2conv.data.photographs")
    monkeypatch.setattr(logger, "warning", lambda text, *values: said.append(text % values))
    found = load_photographs(config)
    assert len(found.train) + len(found.held_out) == len(usable)
    assert len(said) == len(broken)
    for name in broken:
        assert any(name in text for text in said)
    images = [*found.held_out, *found.train]  # the first by name is held out
    assert np.array_equal(images[2][..., 0], ramp >> 8)


def test_photographs_can_be_shrunk_first(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        _picture(tmp_path / name, size=(200, 100))
    config = DataConfig(kind="folder", root=str(tmp_path), side=16, resize=20)
    assert load_photographs(config).train[0].shape == (20, 40, 1)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "folder", "root": "/nowhere/at/all"}, "/nowhere/at/all is not a folder"),
        ({"kind": "folder"}, "set data.root"),
        ({"kind": "video"}, "'video'"),
        ({"side": 400}, "data.side=400"),
        ({"side": 1}, "data.side=1"),
        ({"channels": 2}, "data.channels=2"),
        ({"resize": 4}, "data.resize=4"),
    ],
)
def test_bad_data_is_named(fields, named):
    with pytest.raises(InputError, match=named):
        open_source(DataConfig(**fields), seed=0)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no images"):
        open_source(DataConfig(kind="folder", root=str(tmp_path)), seed=0)
    (tmp_path / "broken.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="0 of 1 images are readable"):
        open_source(DataConfig(kind="folder", root=str(tmp_path)), seed=0)


def _striped_folder(path):
    for i in range(10):
        y, x = np.mgrid[: 20 + i, : 24 + 2 * i]
        planes = [(x * 7 + y * 3 * i) % 256, (x * y + i) % 256, (y * 11 + x * i) % 256]
        Image.fromarray(np.stack(planes, -1).astype(np.uint8)).save(path / f"{i}.png")
    return str(path)


@pytest.mark.parametrize(
    ("fields", "hashes", "std", "first"),
    [
        (
            {"side": 8},
            ("e2797959c0e91fc5", "05d6c9ec7e5ddc70", "ef1bc8643378ea75"),
            66.61968994140625,
            [-0.616102933883667, -0.9613462090492249, -1.0814307928085327],
        ),
        (
            {"side": 8, "channels": 3},
            ("0ed1760542c8effe", "b5ce521ccd116685", "0a69e092c9d5f7fa"),
            73.35035705566406,
            [-1.2834516763687134, -1.4197837114334106, -1.4606832265853882],
        ),
        (
            {"kind": "folder", "side": 8, "channels": 3},
            ("2872477e605c32c3", "c84875d7d0cdc1c6", "c4fbdf63141f83ce"),
            72.1242904663086,
            [-0.9551897048950195, -0.8581350445747375, -0.7610803246498108],
        ),
        (
            {"kind": "folder", "side": 8, "resize": 12},
            ("c78774b1260440ec", "248b947f2d6ad182", "fe34a9e9d5307e86"),
            48.4903564453125,
            [-0.220124751329422, 0.17170573770999908, 0.43980029225349426],
        ),
    ],
)
def test_measured_figures_rest_on_these_very_patches(fields, hashes, std, first, tmp_path):
    """Pixels bit for bit as in the first release; floats to rounding, which processors differ in."""
    if fields.get("kind") == "folder":
        fields = {**fields, "root": _striped_folder(tmp_path)}
    source = open_source(DataConfig(**fields), seed=3)
    reads = (
        source.read(5, 40, range(7, 33)),
        source.read_training_sample(50),
        source.read_held_out(50),
    )
    found = [hashlib.sha256(images.pixels.numpy().tobytes()).hexdigest()[:16] for images in reads]
    assert found == list(hashes)
    assert float(source.std) == pytest.approx(std, rel=1e-6)
    assert source.batch(5, 40, range(7, 33))[0, :3].tolist() == pytest.approx(first, abs=1e-5)


def test_measured_figures_rest_on_this_very_noise():
    source = open_source(DataConfig(kind="noise", side=6), seed=3)
    rows = (
        source.batch(5, 40, range(7, 33))[0],
        source.held_out(2)[1],
        source.training_sample(2)[1],
    )
    first = [float(row[0]) for row in rows]
    assert first == pytest.approx([-0.9376486, -1.1699163, -0.0887014], abs=1e-5)


def test_a_batch_is_what_was_read_standardised(natural):
    for source in (natural, open_source(DataConfig(side=8, permute_pixels=True), seed=0)):
        parts = [source.read(3, 10, rows).pixels for rows in (range(0, 4), range(4, 10))]
        assert parts[0].dtype == torch.uint8
        gathered = source.standardise(torch.cat(parts))
        assert torch.equal(gathered, source.batch(3, 10, range(10)))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "mosaic", "side": 16}, "data.side=16 does not divide"),
        ({"whiten": "pca"}, "data.whiten='pca'"),
        ({"whiten": "zca", "side": 224, "channels": 3}, "169 GiB; lower data.side to 73"),
        ({"whiten_ridge": -1.0}, "data.whiten_ridge=-1.0"),
        ({"kind": "imagenet"}, "set data.root"),
        ({"kind": "imagenet", "root": "x", "on_error": "ignore"}, "data.on_error='ignore'"),
        ({"kind": "imagenet", "root": "x", "workers": 0}, "data.workers=0"),
        ({"kind": "imagenet", "root": "x", "max_bad_share": -0.1}, "data.max_bad_share"),
        ({"flip": True}, "data.flip=True has no meaning for data=natural"),
        ({"cache": "/tmp"}, "data.cache=/tmp has no meaning for data=natural"),
    ],
)
def test_fields_that_contradict_each_other_are_named(fields, named):
    with pytest.raises(InputError, match=re.escape(named)):
        DataConfig(**fields).validate()
