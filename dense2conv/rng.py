"""Random numbers that do not depend on the mesh.

A stream is named by integers, such as ``(seed, NOISE, step)``. Rows come in blocks of fixed size,
each with a generator of its own, so that a process makes just the rows it holds and any two
meshes agree on every number.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# What a stream is for; part of its name, so that no two purposes share numbers.
INIT, PATCHES, NOISE, IMAGES, TUNING, NULL, PERMUTATION = range(7)

_BLOCK = 64  # rows a generator makes


def generator(*name: int) -> torch.Generator:
    """A CPU generator for the stream of that name."""
    state = np.random.SeedSequence(name).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def normal_rows(name: tuple[int, ...], rows: range, width: int) -> Tensor:
    """Standard normal numbers: rows ``rows`` of an endless (·, width) matrix.

    Args:
        name: the stream.
        rows: which rows, step 1; an empty range gives an empty tensor.
        width: length of a row.

    Returns:
        (len(rows), width) float32 on the CPU.
    """
    out = torch.empty(len(rows), width)
    for where, values in normal_blocks(name, rows, width):
        out[where] = values
    return out


def normal_blocks(name: tuple[int, ...], rows: range, width: int) -> Iterator[tuple[slice, Tensor]]:
    """``normal_rows`` a few rows at a time, each with where among ``rows`` they belong."""
    if not rows:
        return
    for block in range(rows.start // _BLOCK, (rows.stop - 1) // _BLOCK + 1):
        values = torch.randn(_BLOCK, width, generator=generator(*name, block))
        first = block * _BLOCK
        start, stop = max(rows.start, first), min(rows.stop, first + _BLOCK)
        where = slice(start - rows.start, stop - rows.start)
        yield where, values[start - first : stop - first]
