"""Sets of encoded images: folders, shards, CIFAR-10's records and tables, and what is wrong with them."""

import io
import json
import logging
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dense2conv.data import DataConfig, open_source
from dense2conv.shapes import InputError

SIDE = 8


def picture(level, size=(SIDE, SIDE), kind="PNG"):
    """One colour, by which an image is known again."""
    file = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(file, kind)
    return file.getvalue()


def shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def open_set(kind, root, **fields):
    fields = {"side": SIDE, "channels": 3, "statistics_samples": 16, "workers": 2, **fields}
    return open_source(DataConfig(kind=kind, root=str(root), **fields), seed=0)


def epoch(source, num):
    """{level: label} of one epoch."""
    images = source.read(0, num, range(num))
    labels = [None] * num if images.labels is None else images.labels.tolist()
    return dict(zip(images.pixels[:, 0].tolist(), labels, strict=True))


@pytest.fixture
def imagenet(tmp_path):
    for split, levels in (("train", range(10, 22)), ("val", range(100, 104))):
        for level in levels:
            path = tmp_path / split / f"n{level % 3}" / f"{level}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(level))
    return tmp_path


def test_folders_by_class(imagenet):
    source = open_set("imagenet", imagenet)
    assert source.classes == ("n0", "n1", "n2")
    assert epoch(source, 12) == {level: level % 3 for level in range(10, 22)}
    held_out = source.read_held_out(4)
    assert sorted(held_out.pixels[:, 0].tolist()) == [100, 101, 102, 103]
    assert held_out.labels.tolist() == [int(level) % 3 for level in held_out.pixels[:, 0]]


def test_without_a_val_folder_every_eighth_image_is_held_out(imagenet):
    source = open_set("imagenet", imagenet / "train")
    trained, held_out = epoch(source, 10), source.read_held_out(2).pixels[:, 0].tolist()
    assert len(trained) == 10
    assert sorted([*trained, *held_out]) == [*range(10, 22)]


def test_held_out_classes_that_are_not_trained_on_are_named_and_have_no_label(imagenet, caplog):
    (imagenet / "val" / "n1").rename(imagenet / "val" / "n9")
    logger = logging.getLogger("dense2conv.data.class_folders")
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    images = open_set("imagenet", imagenet).read_held_out(4)
    logger.removeHandler(handler)
    assert "such as n9" in messages[0]
    assert {
        int(level): int(label)
        for level, label in zip(images.pixels[:, 0], images.labels, strict=True)
    } == {
        100: -1,
        101: 2,
        102: 0,
        103: -1,
    }


def test_images_outside_class_folders_are_named(imagenet):
    (imagenet / "val" / "loose.jpg").write_bytes(picture(1))
    with pytest.raises(InputError, match=r"1 images outside class folders, such as loose.jpg"):
        open_set("imagenet", imagenet)


@pytest.fixture
def shards(tmp_path):
    for number in range(3):
        samples = []
        for level in range(10 + 4 * number, 14 + 4 * number):
            samples += [(f"a/{level}.png", picture(level)), (f"a/{level}.cls", b"%d" % (level % 2))]
        shard(tmp_path / f"train-{number}.tar", samples)
    shard(tmp_path / "test-0.tar", [("x.ppm", picture(99, kind="PPM")), ("x.cls", b"1")])
    (tmp_path / "classes.json").write_text('["even", "odd"]')
    return tmp_path


def test_tar_shards(shards):
    source = open_set("webdataset", shards)
    assert source.classes == ("even", "odd")
    assert epoch(source, 12) == {level: level % 2 for level in range(10, 22)}
    assert source.read_held_out(1).pixels[0, 0] == 99


@pytest.mark.parametrize("pipe", ["", "pipe:cat "])
def test_shards_by_pattern_or_pipe_are_the_same_batches(shards, pipe):
    root = f"{pipe}{shards}/train-{{0..2}}.tar"
    source = open_set("webdataset", root, held_out_root=f"{pipe}{shards}/test-0.tar")
    expected = open_set("webdataset", shards)
    images = source.read(5, 12, range(12))
    assert images.pixels.equal(expected.read(5, 12, range(12)).pixels)
    assert source.read_held_out(1).pixels[0, 0] == 99


def test_a_sample_may_have_any_picture_and_no_label(tmp_path):
    members = [
        ("1.json", b"{}"),
        ("1.jpg", picture(40)),
        ("2.txt", b"no picture"),
        ("3.seg.png", picture(50)),
    ]
    shard(tmp_path / "a.tar", members * 2)
    images = open_set("webdataset", tmp_path).read(0, 3, range(3))
    assert images.labels is None
    assert set(images.pixels[:, 0].tolist()) <= {40, 50}


def broken(shards, number):
    path = shards / f"train-{number}.tar"
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda s: (s / "train-1.tar").unlink(), "train-1.tar cannot be read: No such file"),
        (lambda s: broken(s, 1), "train-1.tar is cut off"),
        (lambda s: (s / "train-1.tar").write_bytes(b""), "train-1.tar is empty"),
        (lambda s: (s / "train-1.tar").write_bytes(b"?" * 999), "train-1.tar is no tar archive"),
        (lambda s: shard(s / "train-1.tar", [("../up.png", picture(1))]), "points out of it"),
        (lambda s: shard(s / "train-1.tar", [("1.png", picture(1)), ("1.cls", b"x")]), "no number"),
        (lambda s: shard(s / "train-1.tar", [("1.png", picture(1)), ("1.cls", b"7")]), "label 7"),
        (
            lambda s: shard(s / "train-1.tar", [("1.png", picture(1)), ("1.cls", b"9" * 18)]),
            "no number",
        ),
        (lambda s: (s / "classes.json").write_text("{"), "classes.json is no JSON"),
        (lambda s: (s / "classes.json").write_text('{"a": 1}'), "no list of class names"),
    ],
    ids="missing cut empty text escape word-label large-label huge-label bad-json no-list".split(),
)
def test_a_damaged_set_of_shards_is_named(shards, damage, named):
    damage(shards)
    with pytest.raises(InputError, match=named):
        open_set("webdataset", shards, on_error="fail")


def test_bad_shards_are_skipped_up_to_a_share(shards):
    broken(shards, 1)
    (shards / "train-2.tar").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"2 of 3 shards are bad, more than data.max_bad_share=0.5"
    ):
        open_set("webdataset", shards, max_bad_share=0.5)
    source = open_set("webdataset", shards, max_bad_share=0.7)
    levels = set(epoch(source, 6))
    assert (
        {10, 11, 12, 13} < levels < {10, 11, 12, 13, 14, 15, 16, 17}
    )  # and those before the damage


@pytest.mark.parametrize(
    ("root", "named"),
    [
        ("nowhere", "nowhere is neither a folder nor a pattern"),
        ("", "holds no \\*.tar"),
        ("pipe:false", "ended with code 1"),
        ("x/train-{0..1}.tar", "train-0.tar cannot be read"),
    ],
)
def test_shards_that_are_not_there_are_named(root, named, tmp_path):
    with pytest.raises(InputError, match=named):
        open_set("webdataset", root or tmp_path)


def cifar_records(levels):
    """Planes of level, level + 1 and level + 2, labelled by the level's last digit."""
    planes = [
        bytes([level % 10, *(level + i for i in range(3) for _ in range(1024))]) for level in levels
    ]
    return b"".join(planes)


def test_cifar10s_binary_files(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for i in range(1, 6):
        (folder / f"data_batch_{i}.bin").write_bytes(cifar_records([10 * i, 10 * i + 1]))
    (folder / "test_batch.bin").write_bytes(cifar_records([200]))
    source = open_set("cifar10", tmp_path, side=32)
    assert source.classes[3] == "cat"
    assert epoch(source, 10) == {10 * i + j: j for i in range(1, 6) for j in (0, 1)}
    channels = source.read_held_out(1).pixels.view(3, 1024)
    assert channels.float().mean(1).tolist() == [200, 201, 202]
    (folder / "data_batch_3.bin").write_bytes(b"12345")
    with pytest.raises(InputError, match=r"data_batch_3.bin has 5 bytes"):
        open_set("cifar10", tmp_path)
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(InputError, match=r"data_batch_3.bin is missing"):
        open_set("cifar10", tmp_path)


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "test_batch").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(InputError, match="would have to be unpickled"):
        open_set("cifar10", tmp_path)


def table(path, levels, column="image", with_labels=True, wrapped=True):
    content = [picture(level) for level in levels]
    images = [{"bytes": data, "path": None} for data in content] if wrapped else content
    columns = {column: images}
    if with_labels:
        columns["label"] = [level % 2 for level in levels]
    pq.write_table(pa.table(columns), path, row_group_size=3)


@pytest.mark.parametrize("wrapped", [True, False])
def test_parquet(tmp_path, wrapped):
    table(tmp_path / "train-0-of-2.parquet", range(10, 15), wrapped=wrapped)
    table(tmp_path / "train-1-of-2.parquet", range(15, 22), wrapped=wrapped)
    table(tmp_path / "validation-0-of-1.parquet", [99], wrapped=wrapped)
    source = open_set("parquet", tmp_path)
    assert epoch(source, 12) == {level: level % 2 for level in range(10, 22)}
    assert source.read_held_out(1).pixels[0, 0] == 99


def test_parquet_without_labels_or_with_other_names(tmp_path):
    table(tmp_path / "a.parquet", range(16), column="img", with_labels=False)
    assert open_set("parquet", tmp_path, image_column="img").read(0, 2, range(2)).labels is None
    with pytest.raises(InputError, match=r"no column 'image' \(data.image_column\); it has img"):
        open_set("parquet", tmp_path)
    pq.write_table(
        pa.table({"image": [picture(1)] * 9, "id": [10**12] * 9}), tmp_path / "a.parquet"
    )
    with pytest.raises(InputError, match=r"data.label_column=id holds 1000000000000"):
        open_set("parquet", tmp_path, label_column="id")
    with pytest.raises(InputError, match="not whole numbers"):
        open_set("parquet", tmp_path, label_column="image")


def test_parquet_files_that_are_damaged_are_named(tmp_path):
    table(tmp_path / "train-0.parquet", range(16))
    (tmp_path / "train-1.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"1 of 2 files are bad.*train-1.parquet cannot be read"):
        open_set("parquet", tmp_path)
    assert len(epoch(open_set("parquet", tmp_path, max_bad_share=0.6), 14)) == 14


def test_pyarrow_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    table(tmp_path / "a.parquet", range(16))
    with pytest.raises(InputError, match=r"data=parquet needs the package pyarrow; pip install"):
        open_set("parquet", tmp_path)


# Policies


def spoil(imagenet, *levels):
    for level in levels:
        (imagenet / "train" / f"n{level % 3}" / f"{level}.JPEG").write_bytes(b"spoilt")


def test_in_place_of_a_bad_image_comes_the_next_with_its_own_label(imagenet):
    expected = open_set("imagenet", imagenet)
    where = expected.read(0, 12, range(12)).pixels[:, 0].tolist()
    spoil(imagenet, 21)  # the last of n0: 12, 15, 18, 21; then 10 stands in, the first of n1
    source = open_set("imagenet", imagenet, max_bad_share=0.1)
    images = source.read(0, 12, range(12))
    assert images.pixels[:, 0].tolist() == [10 if level == 21 else level for level in where]
    assert images.labels.tolist() == [level % 3 for level in images.pixels[:, 0].tolist()]
    for rows in (range(0, 5), range(5, 12)):  # another mesh meets the bad image in another place
        again = open_set("imagenet", imagenet, max_bad_share=0.1).read(0, 12, rows)
        assert again.pixels.equal(images.pixels[rows.start : rows.stop])


def test_each_skip_is_named_once_and_too_many_end_the_run(imagenet, monkeypatch):
    messages = []
    monkeypatch.setattr(
        logging.getLogger("dense2conv.data.skips"),
        "warning",
        lambda text, *values: messages.append(text % values),
    )
    spoil(imagenet, 10, 11)
    source = open_set("imagenet", imagenet, max_bad_share=0.2)
    for step in range(5):
        source.read(step, 12, range(12))
    assert len(messages) == 2
    assert any("n1/10.JPEG" in text and "no picture" in text for text in messages)
    spoil(imagenet, 12)
    with pytest.raises(
        InputError, match=r"3 of \d+ images are bad, more than data.max_bad_share=0.2"
    ):
        open_set("imagenet", imagenet, max_bad_share=0.2, statistics_samples=12)


def test_on_error_fail_stops_at_the_first(imagenet):
    spoil(imagenet, 17)
    with pytest.raises(InputError, match=r"17.JPEG is no picture.*data.on_error=skip"):
        open_set("imagenet", imagenet, on_error="fail")


def test_an_unreadable_and_a_small_image_are_bad_ones(imagenet):
    (imagenet / "train" / "n0" / "12.JPEG").unlink()
    (imagenet / "train" / "n0" / "12.JPEG").symlink_to("/nowhere")
    with pytest.raises(InputError, match=r"12.JPEG cannot be read: No such file"):
        open_set("imagenet", imagenet, on_error="fail")
    (imagenet / "train" / "n0" / "12.JPEG").unlink()
    (imagenet / "train" / "n0" / "12.JPEG").write_bytes(picture(12, size=(1, 1)))
    with pytest.raises(InputError, match=r"1×1 pixels is under data.side=8"):
        open_set("imagenet", imagenet, on_error="fail")
    assert epoch(open_set("imagenet", imagenet, on_error="fail", resize=8), 12)[12] == 0


def test_a_set_that_is_all_bad_ends_soon(imagenet):
    spoil(imagenet, *range(10, 22))
    with pytest.raises(InputError, match=r"none of 12 images is usable|images are bad"):
        open_set("imagenet", imagenet, max_bad_share=1.0)


def test_classes_json_names_the_labels(shards):
    (shards / "classes.json").write_text(json.dumps(["a", "b", "c"]))
    assert open_set("webdataset", shards).classes == ("a", "b", "c")


@pytest.mark.parametrize("kind", ["imagenet", "webdataset", "parquet"])
def test_no_image_stands_in_for_a_set_that_is_gone(kind, tmp_path, request, monkeypatch):
    monkeypatch.setattr("dense2conv.data.parquet._ROW_GROUPS_KEPT", 1)
    if kind == "parquet":
        root = gone = tmp_path / "train.parquet"
        table(root, range(10, 24))
    else:
        root = request.getfixturevalue({"imagenet": "imagenet", "webdataset": "shards"}[kind])
        gone = root / ("train" if kind == "imagenet" else "train-1.tar")
    source = open_set(kind, root, max_bad_share=1.0, prefetch=0)
    source.read(0, 12, range(12))
    assert source.failure_ahead(3) is None
    gone.rename(tmp_path / "elsewhere")
    source.read(1, 12, range(12))  # of those that were waited for
    failure = source.failure_ahead(40)
    assert isinstance(failure, InputError)
    assert f"{gone}, which holds images of this run, is gone (No such file" in str(failure)
    with pytest.raises(InputError, match="is gone"):
        source.read(90, 12, range(12))
