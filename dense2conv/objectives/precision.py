"""Half precision goes up: 8 or 11 bits are too few for sums over samples and features."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precision, ``dtype`` itself otherwise."""
    return torch.promote_types(dtype, torch.float32)


def in_full(*tensors: Tensor) -> list[Tensor]:
    """All in one precision, at least fp32."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return [t.to(dtype) for t in tensors]
