"""NaN and Inf are reported with the layer's name, never passed on."""

from __future__ import annotations

import torch
from torch import Tensor


def require_finite(value: Tensor, name: str) -> Tensor:
    """``value``, a scalar that every process computed alike, or an error on all of them.

    Raises:
        ValueError: it is NaN or infinite, as it is wherever one of the features behind it was.
    """
    if not bool(torch.isfinite(value.detach())):
        raise ValueError(
            f"the objective of {name} is {float(value)}: its features hold NaN or Inf, or overflow; "
            "lower the learning rate, or look at the data"
        )
    return value
