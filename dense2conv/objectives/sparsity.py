"""Sparse weights by exact proximal steps."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def soft_threshold(weight: Tensor, threshold: Tensor | float) -> None:
    """In place, the proximal map of t‖W‖₁: every weight moves t towards zero and stops there.

    Args:
        weight: (d, D).
        threshold: t, a number or (d, 1), one for each row.
    """
    # w - clip(w, ±t) rather than sign·max(|w|-t, 0): one temporary fewer, and zeros are exactly 0.
    limit = torch.as_tensor(threshold, dtype=weight.dtype, device=weight.device)
    weight.sub_(torch.clamp(weight, -limit, limit))
