"""Sparse coding: an input is the sum of few atoms of a dictionary, x ≈ aD.

    minimise E[½‖x − aD‖² + λ Σ_j |a_j|]   over codes a and atoms of unit norm, the rows of D

Atoms are spread over ``layout.features`` (tp) as the rows of a weight are, codes as features,
samples over ``layout.samples`` (dp); inputs x are whole in D. Whatever meets the reconstruction aD
costs one sum of (m/dp, D) numbers over tp.

Sources: Olshausen & Field 1996, Emergence of simple-cell receptive field properties by learning a
sparse code for natural images; with groups, Hyvärinen & Hoyer 2001.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense2conv.objectives.checks import require_finite
from dense2conv.objectives.groups import Groups, group_norms, shrink_groups
from dense2conv.objectives.precision import in_full
from dense2conv.objectives.sparsity import soft_threshold
from dense2conv.objectives.sums import global_shape, shared, total
from dense2conv.rng import INIT, generator, normal_rows
from dense2conv.shapes import SINGLE, InputError, Layout

_POWER_ITERATIONS, _POWER_TOLERANCE = 1000, 1e-5
_MARGIN = 1.01  # power iteration comes from below, and a step must not be too long


@dataclass(frozen=True)
class SparsePrior:
    """What codes cost: λ Σ_j |a_j|, or with groups λ Σ_g √(Σ_{j∈g} a_j² + ε).

    Args:
        price: λ ≥ 0.
        groups: of the d codes; without them each code is a group of its own. Twin atoms in a group
            code their direction √2 cheaper than one: a learned dictionary may make use of that.
        smoothing: ε ≥ 0, in the units of a². At 0 inference takes exact proximal steps, which
            zero whole groups; overlapping groups have none, and need ε > 0.
        nonnegative: whether inferred codes are at least 0.

    Raises:
        InputError: λ < 0, ε < 0, or ε without groups.
    """

    price: float
    groups: Groups | None = None
    smoothing: float = 0.0
    nonnegative: bool = False

    def __post_init__(self) -> None:
        for key in ("price", "smoothing"):
            if not getattr(self, key) >= 0:
                raise InputError(f"{key}={getattr(self, key)}; use 0 or more")
        if self.smoothing > 0 and self.groups is None:
            raise InputError(f"smoothing={self.smoothing} is of groups' norms; give groups too")

    def cost(self, codes: Tensor, layout: Layout = SINGLE) -> Tensor:
        """A scalar in fp64, summed over the samples held here, the same on processes of tp."""
        if self.groups is None:
            return self.price * total(codes.abs().sum(dtype=torch.float64), layout.features)
        norms = group_norms(codes, self.groups, self.smoothing, layout)
        return self.price * norms.sum(dtype=torch.float64)

    @property
    def curvature(self) -> float:
        """A bound on the second derivative of the smoothed cost."""
        if self.groups is None or self.smoothing == 0:
            return 0.0
        return self.price * self.groups.overlap / self.smoothing**0.5

    def gradient(self, codes: Tensor, layout: Layout) -> Tensor:
        """(m/dp, d/tp) of the cost where it is smoothed, otherwise 0: the proximal map sees to it."""
        if self.smoothing == 0:
            return torch.zeros_like(codes)
        with torch.enable_grad():
            leaf = codes.detach().requires_grad_()
            return torch.autograd.grad(self.cost(leaf, layout), leaf)[0]

    def proximal(self, codes: Tensor, step: float, layout: Layout) -> Tensor:
        """argmin_a ½‖a − codes‖² + step · (what ``gradient`` leaves out); may overwrite codes."""
        if self.nonnegative:  # then shrinking, which keeps signs, is the map of both together
            codes = codes.clamp_(min=0)
        if self.groups is None:
            soft_threshold(codes, step * self.price)
        elif self.smoothing == 0:
            codes = shrink_groups(codes, step * self.price, self.groups, layout)
        return codes


def random_dictionary(atoms: range, num_inputs: int, seed: int = 0) -> Tensor:
    """Atoms of random directions and unit norm, own rows of what is the same on any mesh.

    Args:
        atoms: which of all rows, such as ``layout.features.shard(d)``.
        num_inputs: D.

    Returns:
        (len(atoms), D) float32.
    """
    return F.normalize(normal_rows((seed, INIT), atoms, num_inputs))


def sparse_coding_loss(
    inputs: Tensor,
    codes: Tensor,
    dictionary: Tensor,
    prior: SparsePrior,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """E[½‖x − aD‖² + λ‖a‖₁], to be minimised; E is the mean over samples.

    Of inferred codes it is the dictionary's objective. Of the codes that a dense encoder gives it
    is amortised inference: the encoder learns to do in one step what ``sparse_codes`` does in many.

    Args:
        inputs: x (m/dp, D), own samples, whole in D.
        codes: a (m/dp, d/tp), the block held here.
        dictionary: D (d/tp, D), own atoms, of unit norm, or codes shrink at no cost.
        prior: the cost of codes.
        layout: how samples and atoms are spread.
        num_samples: m, where the caller knows it; otherwise it is summed.
        name: whose inputs these are, for error messages.

    Returns:
        A scalar, the same on every process, in the inputs' precision, at least fp32. The gradients
        are those of the whole batch: that of ``dictionary`` is summed over dp already.

    Raises:
        InputError: the shapes do not fit.
        ValueError: the inputs, codes or atoms hold NaN or Inf.
    """
    x, a, atoms = in_full(inputs, codes, dictionary)
    _require_fit(x, a, atoms, name)
    m, _ = global_shape(x, Layout(samples=layout.samples), num_samples)
    error = total(a @ shared(atoms, layout.samples), layout.features) - x  # (m/dp, D)
    cost = 0.5 * error.square().sum(dtype=torch.float64) + prior.cost(a, layout)
    return require_finite(total(cost, layout.samples) / m, name).to(x.dtype)


@torch.no_grad()
def sparse_codes(
    inputs: Tensor,
    dictionary: Tensor,
    prior: SparsePrior,
    start: Tensor | None = None,
    num_iterations: int = 200,
    tolerance: float = 1e-5,
    layout: Layout = SINGLE,
    name: str = "the layer",
) -> Tensor:
    """The codes that minimise ½‖x − aD‖² + λ‖a‖₁, by FISTA with a restart for each sample.

    The step is 1/L, with L the largest eigenvalue of DDᵀ plus the curvature of a smoothed cost. A
    sample whose momentum leads uphill loses it: near the solution convergence is then linear.

    Args:
        inputs: x (m/dp, D), own samples, whole in D.
        dictionary: D (d/tp, D), own atoms.
        prior: the cost of codes.
        start: (m/dp, d/tp), codes to start from, such as the last ones; otherwise 0.
        num_iterations: the most steps; each sums (m/dp, D) numbers over tp, and with groups their
            squared norms.
        tolerance: stops once a step moves all codes of the batch by less than this part of their
            norm.
        layout, name: see ``sparse_coding_loss``.

    Returns:
        a (m/dp, d/tp) in the inputs' precision, at least fp32; not differentiable.

    Raises:
        InputError: the shapes do not fit, groups overlap and are not smoothed, or the numbers of
            iterations or the tolerance are below 0.
        ValueError: the inputs or atoms hold NaN or Inf.

    Sources: Beck & Teboulle 2009, A fast iterative shrinkage-thresholding algorithm for linear
    inverse problems; O'Donoghue & Candès 2015, Adaptive restart for accelerated gradient schemes.
    """
    if num_iterations < 0 or not tolerance >= 0:
        raise InputError(f"{num_iterations=}, {tolerance=}; use 0 or more")
    if start is None:
        start = inputs.new_zeros(len(inputs), len(dictionary))
    x, codes, atoms = in_full(inputs, start, dictionary)
    _require_fit(x, codes, atoms, name)
    largest = _largest_eigenvalue(atoms.mT, Layout(features=layout.features), name)
    step = 1 / (largest + prior.curvature)
    point, time = codes, x.new_ones(len(x), 1)
    for _ in range(num_iterations):
        error = layout.features.sum(point @ atoms) - x  # (m/dp, D)
        gradient = error @ atoms.mT + prior.gradient(point, layout)  # (m/dp, d/tp)
        new = prior.proximal(point - step * gradient, step, layout)
        moved, correction = new - codes, new - point
        products = [(moved * correction).sum(1), correction.square().sum(1), new.square().sum(1)]
        sums = layout.features.sum(torch.stack(products, 1))  # (m/dp, 3)
        _, change, size = layout.samples.sum(sums.sum(0, dtype=torch.float64))
        require_finite(change, name)
        time = time.masked_fill(sums[:, :1] < 0, 1)  # the step turns back: momentum overshot
        next_time = (1 + (1 + 4 * time.square()).sqrt()) / 2
        codes, point, time = new, new + (time - 1) / next_time * moved, next_time
        if change <= tolerance**2 * size:
            break
    return codes


@torch.no_grad()
def updated_dictionary(
    inputs: Tensor,
    codes: Tensor,
    dictionary: Tensor,
    num_steps: int = 10,
    seed: int = 0,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """Atoms of unit norm that reconstruct better with these codes; no step makes it worse.

    A step is D_j ← D_j − a_jᵀ(aD − x) / (c a_jᵀa_j), normalised, for all atoms at once, with c the
    largest eigenvalue of the codes' Gram matrix scaled to unit diagonal: the exact minimum over
    unit atoms of a quadratic that lies above the error and touches it at D. It serves whole
    batches; on small ones, descend ``sparse_coding_loss`` instead.

    An atom that no code uses starts afresh as what the reconstruction misses of one sample, drawn
    by ``seed``, the same on any mesh.

    Args:
        inputs: x (m/dp, D), own samples, whole in D.
        codes: a (m/dp, d/tp), the block held here.
        dictionary: D (d/tp, D), own atoms.
        num_steps: each sums (m/dp, D) numbers over tp and (d/tp, D) over dp.
        seed: of the draw; a new one for each update draws new samples.
        layout, num_samples, name: see ``sparse_coding_loss``.

    Returns:
        (d/tp, D), own atoms, in the inputs' precision, at least fp32; not differentiable.

    Raises:
        InputError: the shapes do not fit, or ``num_steps`` is below 1.
        ValueError: the inputs, codes or atoms hold NaN or Inf.
    """
    if num_steps < 1:
        raise InputError(f"{num_steps=}; use 1 or more")
    x, a, atoms = in_full(inputs, codes, dictionary)
    _require_fit(x, a, atoms, name)
    m, d = global_shape(a, layout, num_samples)
    energy = layout.samples.sum(a.square().sum(0))  # (d/tp,)
    used = energy > 0
    scale = energy.masked_fill(~used, 1).rsqrt()
    step = scale.square() / _largest_eigenvalue(a * scale, layout, name)
    for _ in range(num_steps):
        error = layout.features.sum(a @ atoms) - x  # (m/dp, D)
        gradient = layout.samples.sum(a.mT @ error)  # (d/tp, D)
        atoms = F.normalize(atoms - step[:, None] * gradient)
    drawn = torch.randint(m, (d,), generator=generator(seed, INIT)).to(x.device)
    own = layout.features.shard(d)
    atoms[~used] = _samples(error, drawn[own.start : own.stop][~used], layout, m)
    atoms = F.normalize(atoms)
    require_finite(layout.features.sum(atoms.sum(dtype=torch.float64)), name)
    return atoms


class SparseCoding(nn.Module):
    """``sparse_coding_loss`` with a dictionary of its own, to be minimised over it and an encoder.

    Atoms are normalised before each use, so that any optimizer may move them::

        coding = SparseCoding(random_dictionary(range(d), D), SparsePrior(0.1))
        loss = coding(x, coding.infer(x))  # sparse coding, step by step
        loss = coding(x, encoder(x))  # amortised by a dense encoder, trained with the atoms

    Args:
        dictionary: (d/tp, D), own atoms to start from.
        prior: the cost of codes.
        layout, name: see ``sparse_coding_loss``.
    """

    def __init__(
        self,
        dictionary: Tensor,
        prior: SparsePrior,
        layout: Layout = SINGLE,
        name: str = "the layer",
    ) -> None:
        super().__init__()
        self.dictionary = nn.Parameter(dictionary)
        self.prior, self.layout, self.name = prior, layout, name

    def atoms(self) -> Tensor:
        """(d/tp, D): the dictionary, every atom over its norm."""
        return F.normalize(self.dictionary)

    def infer(
        self,
        inputs: Tensor,
        start: Tensor | None = None,
        num_iterations: int = 200,
        tolerance: float = 1e-5,
    ) -> Tensor:
        """See ``sparse_codes``."""
        return sparse_codes(
            inputs,
            self.atoms(),
            self.prior,
            start,
            num_iterations,
            tolerance,
            self.layout,
            self.name,
        )

    def forward(self, inputs: Tensor, codes: Tensor) -> Tensor:
        """inputs: (m/dp, D); codes: (m/dp, d/tp), inferred or an encoder's."""
        return sparse_coding_loss(
            inputs, codes, self.atoms(), self.prior, self.layout, name=self.name
        )


def _largest_eigenvalue(matrix: Tensor, layout: Layout, name: str) -> float:
    """λ_max(MᵀM), at most 1 % too large, of a matrix (m/dp, d/tp), by power iteration.

    Some hundred products with a vector: no Gram matrix, and no more work than a few steps of
    inference.
    """
    _, d = global_shape(matrix, layout)
    vector = normal_rows((0, INIT), layout.features.shard(d), 1).to(matrix)  # (d/tp, 1)
    largest = 0.0
    for _ in range(_POWER_ITERATIONS):
        image = matrix.mT @ layout.features.sum(matrix @ vector)
        image = layout.samples.sum(image)  # (d/tp, 1)
        squares = layout.features.sum(image.square().sum(dtype=torch.float64))
        previous, largest = largest, float(require_finite(squares.sqrt(), name))
        if abs(largest - previous) <= _POWER_TOLERANCE * largest:
            break
        vector = image / largest
    return max(_MARGIN * largest, torch.finfo(torch.float32).tiny)


def _samples(rows: Tensor, indices: Tensor, layout: Layout, num_samples: int) -> Tensor:
    """(len(indices), D): those rows of all samples, of which each process holds (m/dp, D)."""
    held = layout.samples.shard(num_samples)
    mine = (indices >= held.start) & (indices < held.stop)
    found = rows.new_zeros(len(indices), rows.shape[1])
    found[mine] = rows[indices[mine] - held.start]
    return layout.samples.sum(found)


def _require_fit(inputs: Tensor, codes: Tensor, dictionary: Tensor, name: str) -> None:
    """Raise InputError unless x (m, D), a (m, d) and D (d, D)."""
    fits = inputs.ndim == codes.ndim == dictionary.ndim == 2 and (
        codes.shape == (len(inputs), len(dictionary)) and inputs.shape[1] == dictionary.shape[1]
    )
    if not fits:
        raise InputError(
            f"inputs {tuple(inputs.shape)}, codes {tuple(codes.shape)} and dictionary "
            f"{tuple(dictionary.shape)} of {name} do not fit; use (m, D), (m, d) and (d, D)"
        )
