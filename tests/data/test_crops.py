"""A run over a set: nothing lost, nothing repeated, on any mesh and across restarts."""

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dense2conv.data import DataConfig, Images, open_source
from dense2conv.data.ahead import Prefetched, in_order
from dense2conv.data.crops import Crops
from dense2conv.data.decode import decode
from dense2conv.data.order import shuffled

NUM_TRAIN, NUM_HELD_OUT = 30, 5
SIDE = 8


class Ramps:
    """Pictures that tell who they are: red is the index, green the column, blue the row."""

    classes = ("even", "odd")

    def __init__(self, num, first=0):
        self._num, self._first = num, first

    def __len__(self):
        return self._num

    def pixels(self, index):
        height, width = 12 + index % 3, 16 + index % 5
        y, x = np.mgrid[:height, :width]
        return np.stack([np.full_like(x, self._first + index), x, y], -1).astype(np.uint8)

    def label(self, index):
        return (self._first + index) % 2

    def name(self, index):
        return str(index)

    def fingerprint(self):
        return ""


def crops(seed=0, **fields):
    fields = {"side": SIDE, "channels": 3, "statistics_samples": 64, "workers": 3, **fields}
    config = DataConfig(kind="imagenet", **fields)
    return Crops(config, seed, Ramps(NUM_TRAIN), Ramps(NUM_HELD_OUT, first=100))


@pytest.fixture(scope="module")
def plain():
    return crops()


@pytest.fixture(scope="module")
def flipped():
    return crops(flip=True)


def index_of(images):
    return images.pixels[:, 0].tolist()


def test_each_crop_is_a_window_of_its_picture_with_its_label(flipped):
    images = flipped.read(2, 60, range(60))
    mirrored = 0
    for row, label in zip(images.pixels.view(60, 3, SIDE, SIDE), images.labels, strict=True):
        index = int(row[0, 0, 0])
        picture = torch.from_numpy(Ramps(NUM_TRAIN).pixels(index)).permute(2, 0, 1)
        if row[1, 0, 0] > row[1, 0, 1]:
            row, mirrored = row.flip(2), mirrored + 1
        x, y = int(row[1, 0, 0]), int(row[2, 0, 0])
        assert torch.equal(row, picture[:, y : y + SIDE, x : x + SIDE])
        assert label == index % 2
    assert 15 < mirrored < 45


def test_crops_reach_every_place(plain):
    images = plain.read(0, 3000, range(3000)).pixels.view(3000, 3, SIDE, SIDE)
    of_one = images[images[:, 0, 0, 0] == 0]
    assert set(of_one[:, 1, 0, 0].tolist()) == set(range(16 - SIDE + 1))
    assert set(of_one[:, 2, 0, 0].tolist()) == set(range(12 - SIDE + 1))


@given(st.integers(1, 45), st.integers(1, 4), st.data())
@settings(max_examples=25, deadline=None)
def test_a_run_that_moves_between_meshes_loses_and_repeats_nothing(plain, batch, num_epochs, data):
    num_steps = -(-NUM_TRAIN * num_epochs // batch)
    seen, digest, whole_digest = [], hashlib.sha256(), hashlib.sha256()
    for step in range(num_steps):
        size = data.draw(
            st.integers(1, 4)
        )  # of dp: another mesh after each step, as after restarts
        chunk = -(-batch // size)
        for rank in range(size):
            rows = range(min(rank * chunk, batch), min((rank + 1) * chunk, batch))
            images = plain.read(step, batch, rows)
            seen += index_of(images)
            digest.update(images.pixels.numpy().tobytes())
        whole_digest.update(plain.read(step, batch, range(batch)).pixels.numpy().tobytes())
    for epoch in range(num_epochs):
        assert sorted(seen[epoch * NUM_TRAIN : (epoch + 1) * NUM_TRAIN]) == list(range(NUM_TRAIN))
    assert digest.digest() == whole_digest.digest()


def test_another_process_with_other_threads_reads_the_same(plain):
    other = crops(workers=1)
    assert torch.equal(other.read(7, 33, range(33)).pixels, plain.read(7, 33, range(33)).pixels)
    assert torch.equal(other.batch(7, 33, range(33)), plain.batch(7, 33, range(33)))


def test_seeds_differ_and_the_samples_for_analysis_do_not(plain):
    other = crops(seed=1)
    assert index_of(other.read(0, 30, range(30))) != index_of(plain.read(0, 30, range(30)))
    assert torch.equal(other.held_out(9), plain.held_out(9))
    assert torch.equal(other.training_sample(9), plain.training_sample(9))
    assert torch.equal(
        plain.read_training_sample(9).pixels[3:7], plain.read_training_sample(9, range(3, 7)).pixels
    )


def test_held_out_crops_are_central_until_they_come_again(flipped):
    images = flipped.read_held_out(60).pixels.view(60, 3, SIDE, SIDE)
    first = images[:NUM_HELD_OUT]
    assert sorted(first[:, 0, 0, 0].tolist()) == list(range(100, 105))
    for row in first:
        height, width, _ = Ramps(NUM_HELD_OUT).pixels(int(row[0, 0, 0]) - 100).shape
        y, x = int(row[2, 0, 0]), int(row[1, 0, 0])
        assert (y, x) == ((height - SIDE + 1) // 2, (width - SIDE + 1) // 2)
    assert len({row.numpy().tobytes() for row in images}) > 40
    assert (images[:, 1, 0, 0] < images[:, 1, 0, 1]).all()  # never mirrored


def test_pixels_are_standardised_by_the_sample_they_were_measured_on(plain):
    x = plain.training_sample(64).double().view(64, 3, -1)
    assert x.mean((0, 2)).abs().max() < 1e-5
    assert x.var((0, 2), correction=0).mean() == pytest.approx(1, abs=1e-5)


def test_no_rows_are_no_images(plain):
    images = plain.read(3, 10, range(4, 4))
    assert images.pixels.shape == (0, 3 * SIDE**2)
    assert images.labels.shape == (0,)
    assert plain.batch(3, 10, range(4, 4)).shape == (0, 3 * SIDE**2)


def test_an_epoch_follows_the_order_that_its_counters_have(plain):
    found = index_of(plain.read(1, 20, range(20)))
    assert found == shuffled(np.arange(20, 40), NUM_TRAIN, 0, 3, 0, 3).tolist()


# Reading ahead


class Slow(Crops):
    """Counts the batches that have been read."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.steps = []

    def read(self, step, batch, rows):
        self.steps.append(step)
        return super().read(step, batch, rows)


def slow():
    config = DataConfig(kind="imagenet", side=SIDE, channels=3, statistics_samples=64)
    return Slow(config, 0, Ramps(NUM_TRAIN), Ramps(NUM_HELD_OUT, first=100))


def test_batches_that_are_read_ahead_are_the_same_and_no_more_than_the_depth(plain):
    source = Prefetched(slow(), depth=2)
    for step in (0, 1, 2, 9, 10, 3):  # a restart in between
        assert torch.equal(
            source.read(step, 7, range(2, 7)).pixels, plain.read(step, 7, range(2, 7)).pixels
        )
    assert torch.equal(source.read(3, 7, range(7)).pixels, plain.read(3, 7, range(7)).pixels)
    assert torch.equal(source.batch(4, 7, range(7)), plain.batch(4, 7, range(7)))
    inner = slow()
    source = Prefetched(inner, depth=2)
    source.read(0, 7, range(7))
    deadline = time.monotonic() + 5
    while len(inner.steps) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert inner.steps == [0, 1, 2]


def test_an_error_comes_at_the_step_it_belongs_to():
    class Failing(Slow):
        def read(self, step, batch, rows):
            if step == 2:
                raise OSError("the disk is gone")
            return Images(torch.full((1, 1), step))

    config = DataConfig(kind="imagenet", side=SIDE, channels=3, statistics_samples=8)
    source = Prefetched(Failing(config, 0, Ramps(9), Ramps(2)), depth=3)
    assert [int(source.read(step, 1, range(1)).pixels) for step in (0, 1)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        source.read(2, 1, range(1))
    assert int(source.read(3, 1, range(1)).pixels) == 3


def test_work_ahead_is_bounded_and_in_order():
    started, lock = [], threading.Lock()

    def work(item):
        with lock:
            started.append(item)
        time.sleep(0.002 * (item % 3))
        return item

    with ThreadPoolExecutor(4) as pool:
        results = in_order(pool, work, range(40), ahead=5)
        for expected in range(40):
            assert next(results) == expected
            assert len(started) <= expected + 1 + 5


# From photographs to pixels, the whole way


def test_a_jpeg_on_disk_becomes_the_crop_of_its_resized_self(tmp_path):
    generator = np.random.default_rng(0)
    for i in range(9):
        folder = tmp_path / "train" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 255, (4, 6, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((90, 60), Image.Resampling.BICUBIC)
        picture.save(folder / f"{i}.jpg", quality=95)
    config = DataConfig(
        kind="imagenet", root=str(tmp_path), side=16, channels=3, resize=20, statistics_samples=8
    )
    source = open_source(config, seed=0)
    images = source.read_held_out(2)  # without val/: images 0 and 8 of 9
    paths = sorted(tmp_path.rglob("*.jpg"))
    for row in images.pixels.view(2, 3, 16, 16):
        errors = []
        for path in (paths[0], paths[8]):
            small = Image.fromarray(decode(path.read_bytes())).resize(
                (30, 20), Image.Resampling.BILINEAR
            )
            square = np.asarray(small)[2:18, 7:23].transpose(2, 0, 1).astype(int)
            errors.append(np.abs(row.numpy() - square).max())
        assert min(errors) <= 1  # Pillow's antialiased bilinear, to rounding
