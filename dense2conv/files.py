"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Replace a file so that a kill, or a full disk, leaves the old one or the new one, never half.

    content: what it shall hold, or what writes it under the name that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if callable(content):
            content(partial)
            # Some writers let nobody else read what they wrote.
            partial.chmod(path.parent.stat().st_mode & 0o666)
        with partial.open("ab") as file:
            if not callable(content):
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
