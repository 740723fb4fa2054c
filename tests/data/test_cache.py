"""The cache of decoded pixels: the same images, built once, and refused when anything is wrong with it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dense2conv.data import DataConfig, cache, open_source
from dense2conv.shapes import InputError


@pytest.fixture
def config(tmp_path):
    generator = np.random.default_rng(0)
    for i in range(24):
        folder = tmp_path / "set" / ("val" if i % 8 == 0 else "train") / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (20 + i % 4, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return DataConfig(
        kind="imagenet",
        root=str(tmp_path / "set"),
        side=8,
        channels=3,
        resize=12,
        flip=True,
        statistics_samples=16,
        max_bad_share=0.2,
        cache=str(tmp_path / "cache"),
    )


def with_(config, **fields):
    return DataConfig(**{**vars(config), **fields})


def everything(source):
    rows = range(30)
    return torch.cat([source.read(2, 30, rows).pixels, source.read_held_out(9).pixels])


def folders(config):
    return sorted(path.name for path in Path(config.cache).iterdir() if path.is_dir())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resize", [0, 12])
def test_a_cached_set_gives_the_same_batches(config, channels, resize):
    config = with_(config, channels=channels, resize=resize)
    expected = open_source(with_(config, cache=None), seed=0)
    for _ in range(2):  # built, then found
        source = open_source(config, seed=0)
        assert torch.equal(everything(source), everything(expected))
        assert torch.equal(source.read(0, 9, range(9)).labels, expected.read(0, 9, range(9)).labels)
        assert torch.equal(source.batch(0, 9, range(9)), expected.batch(0, 9, range(9)))


def test_a_cache_is_built_once_and_not_decoded_from_again(config, monkeypatch):
    first = everything(open_source(config, seed=0))
    monkeypatch.setattr("dense2conv.data.encoded.decode", lambda data: pytest.fail("decoded again"))
    assert torch.equal(everything(open_source(config, seed=0)), first)
    assert folders(config) == ["held_out-12x3", "train-12x3"]


def test_bad_images_stay_bad_ones_with_their_reason(config):
    bad = sorted(Path(config.root, "train").rglob("*.png"))[3]
    bad.write_bytes(b"")
    expected = everything(open_source(with_(config, cache=None), seed=0))
    for _ in range(2):
        assert torch.equal(everything(open_source(config, seed=0)), expected)
    with pytest.raises(InputError, match=f"{bad.name} is empty.*on_error=skip"):
        open_source(with_(config, on_error="fail"), seed=0)


def test_too_many_bad_images_leave_no_cache(config):
    for path in sorted(Path(config.root, "train").rglob("*.png"))[::2]:
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"images are bad, more than data.max_bad_share=0.2"):
        open_source(config, seed=0)
    assert folders(config) == []


def rewrite(path, change):
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(bytes(content))


def flip_a_bit(content):
    content[len(content) // 2] ^= 1


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (
            lambda f: rewrite(f / "pixels.bin", lambda c: c.pop()),
            "damaged .its files are not those",
        ),
        (lambda f: rewrite(f / "index.npy", flip_a_bit), "damaged .its files are not those"),
        (lambda f: (f / "index.npy").unlink(), "damaged .No such file"),
        (
            lambda f: rewrite(f / "pixels.bin", flip_a_bit),
            r"damaged .image \d+ is not what was written",
        ),
        (lambda f: rewrite(f / "manifest.json", lambda c: c.pop()), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_text('{"format": 99}'), "of another version"),
        (lambda f: (f / "manifest.json").unlink(), "is no cache"),
    ],
    ids="short-pixels index no-index pixels manifest version no-manifest".split(),
)
def test_a_damaged_cache_is_named(config, damage, named):
    open_source(config, seed=0)
    damage(Path(config.cache) / "train-12x3")
    with pytest.raises(InputError, match=named):
        everything(open_source(config, seed=0))


def test_a_pickle_in_the_index_is_not_read(config):
    open_source(config, seed=0)
    folder = Path(config.cache) / "train-12x3"
    np.save(folder / "index.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["index_crc"] = zlib.crc32((folder / "index.npy").read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        open_source(config, seed=0)


@pytest.mark.parametrize("change", ["added", "removed", "written anew"])
def test_a_cache_of_other_files_is_refused(config, change):
    open_source(config, seed=0)
    path = sorted(Path(config.root, "train").rglob("*.png"))[0]
    if change == "added":
        path.with_name("new.png").write_bytes(path.read_bytes())
    elif change == "removed":
        path.unlink()
    else:
        os.utime(path, (1, 1))
    with pytest.raises(InputError, match=r"was made of other files.*delete it to build it anew"):
        open_source(config, seed=0)


def test_a_full_disk_is_named_and_leaves_nothing(config, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.raises(InputError, match="cannot be written: No space left on device; make room"):
        open_source(config, seed=0)
    assert folders(config) == []


_OPEN = """
    import hashlib, sys, time
    from dense2conv.data import DataConfig, open_source, cache
    config = DataConfig(**eval(sys.argv[1]))
    builds = []
    write = cache._write
    def slow_write(*arguments):
        builds.append(1)
        print("building", flush=True)
        time.sleep(float(sys.argv[2]))
        return write(*arguments)
    cache._write = slow_write
    source = open_source(config, seed=0)
    pixels = source.read(0, 30, range(30)).pixels.numpy().tobytes()
    print(len(builds), hashlib.sha256(pixels).hexdigest(), flush=True)
"""


def start(config, pause):
    words = [sys.executable, "-c", textwrap.dedent(_OPEN), repr(vars(config)), str(pause)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_processes_share_one_build_and_a_killed_one_leaves_none(config):
    killed = start(config, 60)
    assert killed.stdout.readline() == "building\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not any(
        (Path(config.cache) / name / "manifest.json").exists() for name in folders(config)
    )

    outputs = [
        process.communicate(timeout=60)[0].split()
        for process in (start(config, 0.2), start(config, 0.2))
    ]
    results = [words[-2:] for words in outputs]
    assert sum(int(builds) for builds, _ in results) == 2  # one of train, one of held_out
    assert results[0][1] == results[1][1]
    assert folders(config) == ["held_out-12x3", "train-12x3"]
