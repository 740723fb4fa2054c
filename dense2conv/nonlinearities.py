"""The element-wise functions between layers, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dense2conv.shapes import InputError

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "abs": torch.abs,
    "softshrink": F.softshrink,  # threshold ½
    "tanh": torch.tanh,
}


def nonlinearity(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name.

    Raises:
        InputError: for a name that is none.
    """
    if name not in NONLINEARITIES:
        raise InputError(
            f"model.nonlinearity={name!r} is unknown; use one of {', '.join(NONLINEARITIES)}"
        )
    return NONLINEARITIES[name]
