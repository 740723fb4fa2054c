"""Where the files in a tar archive lie, read off its headers alone (POSIX ustar, GNU and pax names).

Nothing is ever extracted: a member's name is a name, not a path that is opened.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import NamedTuple, Protocol

_BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")


class BadArchive(Exception):
    """An archive that is no tar, or ends too early; the message says which."""


class Member(NamedTuple):
    """A regular file in an archive, of ``size`` bytes from ``start`` on."""

    name: str
    start: int
    size: int


class Bytes(Protocol):
    """An archive's bytes, by slices: ``bytes``, or a file that is read where it is asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> bytes: ...


def members(archive: Bytes) -> Iterator[Member]:
    """The regular files of an archive, in order; links, devices and folders are passed over.

    Raises:
        BadArchive: at the first header that is damaged, or a file that goes beyond the archive's end.
    """
    position, long_name, long_size = 0, "", None
    while position < len(archive):
        header = archive[position : position + _BLOCK]
        if not header.strip(b"\0"):
            return
        if len(header) < _BLOCK or _number(header[148:156]) != _checksum(header):
            raise BadArchive(f"is no tar archive, or is damaged at byte {position}")
        kind = header[156:157]
        size = _number(header[124:136]) if long_size is None else long_size
        start = position + _BLOCK
        position = start + -(-size // _BLOCK) * _BLOCK
        if position > len(archive):
            raise BadArchive(f"is cut off: {position - len(archive)} bytes are missing")
        if kind == b"L":
            long_name = _text(archive[start : start + size])
        elif kind == b"x":
            records = _pax_records(archive[start : start + size])
            long_name = records.get("path", long_name)
            long_size = int(records["size"]) if "size" in records else None
        elif kind not in (b"g", b"K"):
            if kind in _REGULAR:
                yield Member(_inside(long_name or _short_name(header)), start, size)
            long_name, long_size = "", None
    raise BadArchive("is cut off: the blocks of zeros at its end are missing")


def _inside(name: str) -> str:
    """``name``, unless it points out of the archive."""
    parts = posixpath.normpath(name).split("/")
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise BadArchive(f"holds {name!r}, which points out of it; it is not to be trusted")
    return name


def _short_name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="surrogateescape")


def _number(field: bytes) -> int:
    """Octal digits, or GNU's big-endian form for what needs more than 11 of them."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise BadArchive("is no tar archive, or has a damaged header") from error


def _checksum(header: bytes) -> int:
    return sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _pax_records(content: bytes) -> dict[str, str]:
    """Records of the form ``LENGTH key=value``, each with a newline that counts."""
    records = {}
    while content:
        try:
            length = int(content.partition(b" ")[0])
            key, _, value = content[:length].partition(b" ")[2].partition(b"=")
        except ValueError as error:
            raise BadArchive("has a damaged pax header") from error
        records[key.decode()] = value[:-1].decode(errors="surrogateescape")
        content = content[max(length, 1) :]
    return records
