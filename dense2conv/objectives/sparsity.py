"""Penalties that make weights exactly zero, each with its exact proximal step, for spread weights.

    W (d, D)   weights of a layer; a process holds the rows ``axis.shard(d)``, (d/tp, D)

An optimizer drives any of them alike, by name (``make_penalty``)::

    penalty.add_subgradient_(weight.grad, weight)  # before its step; most penalties add nothing
    ...                                            # its gradient step, of size η
    penalty.prox_(weight, step_size, axis)         # argmin_U ‖U − W‖² / 2η + penalty(U), in place
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dense2conv.objectives.precision import at_least_fp32
from dense2conv.shapes import WHOLE, Axis, InputError

_CHUNK = 1 << 20  # weights that a temporary may copy: few megabytes, which caches hold


@torch.no_grad()
def soft_threshold(weight: Tensor, threshold: Tensor | float) -> None:
    """In place, the proximal map of t‖W‖₁: every weight moves t towards zero and stops there.

    Args:
        weight: (d, D).
        threshold: t, a number or (d, 1), one for each row.
    """
    limit = torch.as_tensor(threshold, dtype=at_least_fp32(weight.dtype), device=weight.device)
    for rows in _row_chunks(weight):
        t = limit[rows] if limit.ndim else limit
        # w - clip(w, ±t) rather than sign·max(|w|-t, 0): zeros are exactly 0, and a bf16 weight is
        # rounded once.
        weight[rows].sub_(weight[rows].to(limit.dtype).clamp(-t, t))


@torch.no_grad()
def hard_threshold(weight: Tensor, threshold: float) -> None:
    """In place, 0 for every weight (d, D) whose magnitude is below ``threshold``."""
    for rows in _row_chunks(weight):
        small = weight[rows].to(at_least_fp32(weight.dtype)).abs() < threshold
        weight[rows].masked_fill_(small, 0)


@dataclass(frozen=True)
class Penalty(ABC):
    """A price on weights that sets some of them to zero.

    strength: λ, what ``value`` is a multiple of.
    """

    strength: float

    def __post_init__(self) -> None:
        _require_finite(strength=self.strength)

    @abstractmethod
    def value(self, weight: Tensor, axis: Axis = WHOLE) -> Tensor:
        """The price of the whole W, a scalar in fp64, the same on every process of ``axis``.

        weight: (d/tp, D), own rows. No gradient flows through it: it is for the log.
        """

    def add_subgradient_(self, gradient: Tensor, weight: Tensor) -> None:  # noqa: B027
        """In place, what of the price the gradient step itself takes: none, ``prox_`` takes it all."""

    @abstractmethod
    def prox_(self, weight: Tensor, step_size: Tensor | float, axis: Axis = WHOLE) -> None:
        """In place, the proximal map of ``step_size`` times the price.

        Args:
            weight: (d/tp, D), own rows.
            step_size: η > 0, a number, or (d/tp, 1): own rows' in a metric of one scalar a row.
            axis: over which the rows are spread.

        Raises:
            InputError: a step size a row, where the map has no closed form with it.
        """


class L1(Penalty):
    """λ Σ|w|; its map is the soft threshold. A step size a row is exact."""

    @torch.no_grad()
    def value(self, weight: Tensor, axis: Axis = WHOLE) -> Tensor:
        return self.strength * axis.sum(_row_norms(weight, 1).sum())

    def prox_(self, weight: Tensor, step_size: Tensor | float, axis: Axis = WHOLE) -> None:
        soft_threshold(weight, step_size * self.strength)


class GroupRows(Penalty):
    """λ Σ_i ‖w_i‖₂ over rows, a group for each unit: units are dropped whole (Yuan & Lin 2006).

    Rows are local, so nothing is communicated; a step size a row is exact.
    """

    @torch.no_grad()
    def value(self, weight: Tensor, axis: Axis = WHOLE) -> Tensor:
        return self.strength * axis.sum(_row_norms(weight, 2).sum())

    @torch.no_grad()
    def prox_(self, weight: Tensor, step_size: Tensor | float, axis: Axis = WHOLE) -> None:
        norms = _row_norms(weight, 2)[:, None]  # (d/tp, 1)
        _scale_(weight, _shrinkage(norms, step_size * self.strength))


@dataclass(frozen=True, eq=False)
class GroupColumns(Penalty):
    """λ Σ_g ‖W_g‖₂ over groups of columns: inputs are dropped for all units at once.

    Groups cross processes: the columns' squared norms are summed over ``axis``, one all-reduce of D
    numbers. A step size a row is refused: in such a metric a group's norm and its distance are
    different ellipsoids, and their proximal map has no closed form.

    groups: (D,) int64, the group of every input from 0 up, e.g. its place, to group the channels of
        one pixel; every input its own by default. Groups are not weighted by their size.
    """

    groups: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        groups = self.groups
        if groups is None:
            return
        if groups.ndim != 1 or groups.is_floating_point() or bool((groups < 0).any()):
            raise InputError(
                f"groups of shape {tuple(groups.shape)} and type {groups.dtype}; give every input "
                "the number of its group, (D,) integers from 0 up"
            )

    @torch.no_grad()
    def value(self, weight: Tensor, axis: Axis = WHOLE) -> Tensor:
        return self.strength * self._norms(weight, axis).sum()

    @torch.no_grad()
    def prox_(self, weight: Tensor, step_size: Tensor | float, axis: Axis = WHOLE) -> None:
        if isinstance(step_size, Tensor) and step_size.ndim > 0:
            raise InputError(
                f"a step size of shape {tuple(step_size.shape)} for groups of columns, which cross "
                "rows; use one number, i.e. an optimizer without a metric a row, or group_rows"
            )
        scale = _shrinkage(self._norms(weight, axis), step_size * self.strength)  # (num_groups,)
        _scale_(weight, scale if self.groups is None else scale[self._groups(weight)])

    def _norms(self, weight: Tensor, axis: Axis) -> Tensor:
        """‖W_g‖₂ of every group over all processes."""
        squares = weight.new_zeros(weight.shape[1], dtype=torch.float64)  # (D,)
        for rows in _row_chunks(weight):
            squares += torch.linalg.vector_norm(weight[rows].double(), dim=0).square_()
        squares = axis.sum(squares)
        if self.groups is not None:
            groups = self._groups(weight)
            summed = squares.new_zeros(int(groups.max()) + 1 if len(groups) else 0)
            squares = summed.index_add_(0, groups, squares)
        return squares.sqrt_()

    def _groups(self, weight: Tensor) -> Tensor:
        assert self.groups is not None
        if len(self.groups) != weight.shape[1]:
            raise InputError(
                f"{len(self.groups)} groups for weights of {weight.shape[1]} inputs; name the group "
                "of every input"
            )
        return self.groups.to(weight.device)


@dataclass(frozen=True)
class BetaLasso(Penalty):
    """β-lasso (Neyshabur 2020, "Towards Learning Convolutions from Scratch"): λ Σ|w|, cut at βλ.

    θ ← θ − η (g + λ sign θ), then θ ← 0 where |θ| < βλ. Its L1 is a subgradient in the step, so the
    threshold knows no learning rate, and a weight stays zero until one step takes it past βλ. Not
    a proximal map.

    beta: β, 50 in the paper's best networks.
    """

    beta: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_finite(beta=self.beta)

    @torch.no_grad()
    def value(self, weight: Tensor, axis: Axis = WHOLE) -> Tensor:
        return L1(self.strength).value(weight, axis)

    @torch.no_grad()
    def add_subgradient_(self, gradient: Tensor, weight: Tensor) -> None:
        for rows in _row_chunks(weight):
            gradient[rows].add_(weight[rows].sign(), alpha=self.strength)

    def prox_(self, weight: Tensor, step_size: Tensor | float, axis: Axis = WHOLE) -> None:
        hard_threshold(weight, self.beta * self.strength)


PENALTIES: dict[str, type[Penalty]] = {
    "l1": L1,
    "group_rows": GroupRows,
    "group_columns": GroupColumns,
    "beta_lasso": BetaLasso,
}


def make_penalty(name: str, strength: float, **options: Any) -> Penalty:
    """The penalty called ``name`` in ``PENALTIES``, of strength λ; InputError for another name."""
    if name not in PENALTIES:
        raise InputError(f"penalty {name!r} is unknown; use {', '.join(PENALTIES)}")
    return PENALTIES[name](strength, **options)


def _row_chunks(weight: Tensor) -> Iterator[slice]:
    """Rows few enough that a temporary of their size costs no memory to speak of."""
    if torch.compiler.is_compiling():  # into one pass, without temporaries
        yield slice(None)
        return
    step = max(1, _CHUNK // max(1, math.prod(weight.shape[1:])))
    for start in range(0, len(weight), step):
        yield slice(start, start + step)


def _row_norms(weight: Tensor, order: int) -> Tensor:
    """‖w_i‖ of own rows in fp64: (d/tp,)."""
    norms = weight.new_empty(len(weight), dtype=torch.float64)
    for rows in _row_chunks(weight):
        norms[rows] = torch.linalg.vector_norm(weight[rows].double(), order, dim=1)
    return norms


def _shrinkage(norms: Tensor, threshold: Tensor | float) -> Tensor:
    """max(0, 1 − t/‖w‖), what is left of a group; 0 of a group that is zero."""
    return ((norms - threshold) / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp_(min=0)


def _scale_(weight: Tensor, scale: Tensor) -> None:
    """In place, own rows times ``scale``: (d/tp, 1), or (D,) for columns."""
    scale = scale.to(at_least_fp32(weight.dtype))
    for rows in _row_chunks(weight):
        weight[rows].mul_(scale[rows] if scale.ndim == 2 else scale)


def _require_finite(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise InputError(f"{name}={value}; use a number from 0 up")
