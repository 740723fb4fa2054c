"""The index of a tar archive against Python's own tarfile, and against archives that lie."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dense2conv.data.tar_index import BadArchive, members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def archive(files, kind="ustar"):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=FORMATS[kind]) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def contents(data):
    return [(m.name, data[m.start : m.start + m.size]) for m in members(data)]


_names = st.text("abcé語._-", min_size=1, max_size=40).filter(lambda name: name.strip("."))


@given(
    st.lists(st.tuples(_names, st.binary(max_size=1500)), max_size=6), st.sampled_from([*FORMATS])
)
@settings(max_examples=60, deadline=None)
def test_files_are_where_tarfile_put_them(files, kind):
    assert contents(archive(files, kind)) == files


@pytest.mark.parametrize("kind", FORMATS)
def test_long_names(kind):
    name = "/".join(["a" * 60, "b" * 60, "c" * 30 + ".jpg"])
    assert contents(archive([(name, b"x"), ("y", b"z")], kind)) == [(name, b"x"), ("y", b"z")]


def test_links_devices_and_folders_are_passed_over():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo("trap.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    out.seek(0, io.SEEK_END)
    assert contents(out.getvalue()) == []


@pytest.mark.parametrize("name", ["../up.jpg", "/etc/passwd", "a/../../up.jpg", "./../x"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_name_that_points_out_of_the_archive_is_refused(name, kind):
    with pytest.raises(BadArchive, match="points out of it"):
        contents(archive([("good", b"1"), (name, b"2")], kind))


@pytest.mark.parametrize(
    ("length", "complete", "named"),
    [
        (2 * 1536, 2, "zeros at its end are missing"),  # between two files
        (2 * 1536 - 100, 1, "100 bytes are missing"),
        (1536 + 512, 1, "1024 bytes are missing"),
        (1600, 1, "damaged at byte 1536"),
        (0, 0, "zeros at its end are missing"),
    ],
)
def test_an_archive_that_is_cut_gives_what_is_whole(length, complete, named):
    data = archive([("a", b"1" * 700), ("b", b"2" * 700)])
    found = []
    with pytest.raises(BadArchive, match=named):
        found.extend(member.name for member in members(data[:length]))
    assert found == ["a", "b"][:complete]


def test_what_is_no_tar_is_named():
    for data in (b"PK\x03\x04" + bytes(600), b"\x1f\x8b" * 600, b"text" * 300):
        with pytest.raises(BadArchive, match="no tar archive"):
            contents(data)


def test_a_flipped_bit_in_a_header_is_noticed():
    data = bytearray(archive([("abc", b"1"), ("def", b"2")]))
    data[1024 + 126] ^= 1  # the second file's size
    with pytest.raises(BadArchive, match="damaged at byte 1024"):
        contents(bytes(data))


def test_a_size_in_gnus_binary_form():
    data = bytearray(archive([("a", b"12345")]))
    data[124:136] = b"\x80" + (5).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    assert contents(bytes(data)) == [("a", b"12345")]
