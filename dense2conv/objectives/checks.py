"""Inputs that cannot be are named: hyper-parameters by their value, NaN and Inf by their layer."""

from __future__ import annotations

import torch
from torch import Tensor

from dense2conv.shapes import InputError


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


def require_positive(**values: float) -> None:
    """Raise InputError for the first value that is not above zero."""
    for key, value in values.items():
        if not value > 0:
            raise InputError(f"{key}={value}; use a positive number")


def require_at_least(least: float, **values: float) -> None:
    """Raise InputError for the first value that is below ``least``, or no number."""
    for key, value in values.items():
        if not value >= least:
            raise InputError(f"{key}={value}; use {least} or more")
