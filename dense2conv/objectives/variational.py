"""Variational rate reduction: MCR² for very many classes, without a log-determinant for each.

    M_k = Z_kᵀZ_k / m_k   (d, d) second moment of the m_k samples of class k; never built for all k
    Γ   (d, q)  dictionary: q atoms of unit norm for all classes, features spread as Z's are
    A   (q, K)  spectra: a_k ≥ 0 says how much of each atom is in class k; the same everywhere

Σ_l log(1 + c λ_l) over the eigenvalues of M_k is the least Σ_l log(1 + c a_l) over all ways to write
M_k as Γ diag(a) Γᵀ with unit atoms (Hadamard's inequality); the eigenvectors attain it. So the
class rate becomes a sum over atoms, and a penalty holds Γ diag(a_k) Γᵀ to M_k:

    R_c^v = Σ_k (m_k/2m) [ Σ_l log(1 + (d/ε²) a_lk) + μ ‖M_k − Γ diag(a_k) Γᵀ‖_F² ]

(Baek, Wu, Chan, Ding, Ma, Haeffele, CVPR 2022, whose A is m_k times this one: per sample, A and μ
mean the same in batches of any size and mixture.) It saves time over d×d log-determinants, not over
``rate_reduction``, whose terms are on their small side; it is another path to the same optimum.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dense2conv.objectives.checks import require_finite, require_positive
from dense2conv.objectives.precision import at_least_fp32
from dense2conv.objectives.rates import CodingRate, coding_rate
from dense2conv.objectives.sums import global_shape, joined, own, shared, total
from dense2conv.rng import INIT, normal_rows
from dense2conv.shapes import SINGLE, Axis, InputError, Layout


def variational_class_rate(
    features: Tensor,
    labels: Tensor,
    dictionary: Tensor,
    spectra: Tensor,
    epsilon_squared: float,
    penalty: float,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    num_features: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """R_c^v in nats, the classes' coding rate plus the penalty on a dictionary that does not fit.

    It costs products of m·d·q, m·d·min(m_k, d), d·q² and K·q², with no factorisation.

    Args:
        features: (m, d) with samples as rows, or this process's block (m/dp, d/tp).
        labels: own samples' classes (m/dp,), integers below K, negative where unknown: such samples
            count in m alone. A class without samples here has no part in the value.
        dictionary: Γ (d/tp, q), own features' rows; its columns are normalised here.
        spectra: A (q, K), the same everywhere; what is below 0 counts as 0.
        epsilon_squared: ε², the distortion.
        penalty: μ; the value is at least the exact R_c where the penalty is zero.
        layout, num_samples, num_features: see ``logdet_i_plus``.
        name: whose features these are, for error messages.

    Returns:
        A scalar, the same on every process, at least fp32 (sums in fp64); differentiable to any
        order with respect to features, dictionary and spectra.

    Raises:
        InputError: labels of another length, kind or range; sizes that do not fit.
        ValueError: the features hold NaN or Inf.
    """
    require_positive(epsilon_squared=epsilon_squared, penalty=penalty)
    dp, tp = layout.samples, layout.features
    m, d = global_shape(features, layout, num_samples, num_features)
    if dictionary.shape != (features.shape[1], spectra.shape[0]):
        raise InputError(
            f"a dictionary of shape {tuple(dictionary.shape)} for {features.shape[1]} features and "
            f"spectra of {spectra.shape[0]} atoms; give (features, atoms)"
        )
    classes = _Classes.of(features, labels, spectra.shape[1], dp, m)
    counts = classes.counts.double()[:, None]  # (k, 1), k classes present

    z = features.double()
    atoms = dictionary.double()
    atoms = atoms / shared(total(atoms.square().sum(0), tp), tp).sqrt()  # (d/tp, q)
    a = spectra.double().clamp(min=0)[:, classes.present].T  # (k, q)

    projections = total(z @ shared(atoms, dp), tp)  # (m/dp, q)
    place = own(classes.place, dp)
    known = place >= 0
    powers = z.new_zeros(a.shape).index_add(0, place[known], projections[known].square())
    powers = total(powers, dp)  # (k, q): γ_lᵀ Z_kᵀZ_k γ_l
    overlaps = total(atoms.T @ atoms, tp).square()  # (q, q)

    # Σ_k m_k ‖M_k − Γ diag(a_k) Γᵀ‖_F², the square written out: no term needs a d×d matrix.
    misfit = (
        _squared_moments(z, classes, layout, m, d)
        - 2 * (a * powers).sum()
        + (counts * a * (a @ overlaps)).sum()
    )
    rate = (counts * torch.log1p(d / epsilon_squared * a)).sum()
    value = require_finite((rate + penalty * misfit) / (2 * m), name)
    return value.to(at_least_fp32(features.dtype))


def variational_rate_reduction(
    features: Tensor,
    labels: Tensor,
    dictionary: Tensor,
    spectra: Tensor,
    epsilon_squared: float,
    penalty: float,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    num_features: int | None = None,
    name: str = "the layer",
) -> Tensor:
    """ΔR^v = R(Z) − R_c^v in nats, to be maximised over features, dictionary and spectra.

    Arguments as for :func:`variational_class_rate`. Samples without a class count in R.
    """
    m, d = global_shape(features, layout, num_samples, num_features)
    class_rate = variational_class_rate(
        features, labels, dictionary, spectra, epsilon_squared, penalty, layout, m, d, name
    )
    return coding_rate(features, epsilon_squared, layout, m, d, name) - class_rate


class VariationalRateReduction(nn.Module):
    """−ΔR^v, to be minimised, with Γ and A as parameters: train them along with the network.

    Features meet the class rate through the penalty alone, so A has to follow them: give Γ and A
    their own learning rate, and ``latch`` before the first step and every so often (50 epochs in
    the paper). A spectrum that a step takes below 0 is off until the next latch.

    Args:
        num_features: d, of the whole layer; with features spread, Γ holds this process's rows.
        num_classes: K.
        num_atoms: q; the sum of the classes' dimensions makes the latched value exact.
        epsilon_squared: ε², the distortion.
        penalty: μ; atoms whose eigenvalues are below about √(2/μ) fade away, so with samples of norm 1 and
            r dimensions a class, μ has to be over 2r².
        bound, layout, name: see ``CodingRate``.
        seed: of the random atoms before the first latch.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        num_atoms: int,
        epsilon_squared: float = 0.5,
        penalty: float = 100.0,
        bound: Literal["sphere", "power", "none"] = "sphere",
        layout: Layout = SINGLE,
        name: str = "the layer",
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_positive(num_features=num_features, num_classes=num_classes, num_atoms=num_atoms)
        self.rate = CodingRate(epsilon_squared, bound, layout, name=name)
        self.num_features, self.penalty = num_features, penalty
        rows = layout.features.shard(num_features)
        self.dictionary = nn.Parameter(normal_rows((seed, INIT), rows, num_atoms))  # (d/tp, q)
        self.spectra = nn.Parameter(torch.full((num_atoms, num_classes), 1 / num_atoms))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """features: (m/dp, d/tp); labels (m/dp,) as for :func:`variational_class_rate`."""
        rate = self.rate
        return -variational_rate_reduction(
            rate.bounded(features),
            labels,
            self.dictionary,
            self.spectra,
            rate.epsilon_squared,
            self.penalty,
            rate.layout,
            num_features=self.num_features,
            name=rate.name,
        )

    @torch.no_grad()
    def latch(self, features: Tensor, labels: Tensor) -> None:
        """Set Γ and A to the classes' eigenvectors and eigenvalues, those of largest m_k a² first.

        If they are fewer than q, the other atoms stay, unused (a = 0); if they are more, this is
        the choice of least penalty among them. A class without samples is left without atoms.

        features, labels: as for ``forward``, of the whole training set or a large sample of it.
        """
        layout, d = self.rate.layout, self.num_features
        z = self.rate.bounded(features).double()
        m, _ = global_shape(z, layout, None, d)
        require_finite(total(z.square().sum(), layout.samples, layout.features), self.rate.name)
        classes = _Classes.of(z, labels, self.spectra.shape[1], layout.samples, m)
        held = layout.features.shard(d)
        vectors, values, owners = [z[:0]], [z.new_zeros(0)], [classes.present[:0]]
        everyone = layout.samples.gather(z, m)  # (m, d/tp)
        for k, z_k in zip(classes.present, classes.split(everyone, classes.place), strict=True):
            whole = layout.features.gather(z_k, d, dim=1)  # (m_k, d), one class at a time
            _, singular, right = torch.linalg.svd(whole, full_matrices=False)
            vectors.append(right[:, held.start : held.stop])
            values.append(singular.square() / len(z_k))
            owners.append(k.expand(len(singular)))
        eigenvalues, owner = torch.cat(values), torch.cat(owners)
        num_labelled = torch.zeros_like(self.spectra[0], dtype=torch.float64)
        num_labelled[classes.present] = classes.counts.double()
        price = num_labelled[owner] * eigenvalues.square()  # of leaving one out
        kept = price.argsort(descending=True, stable=True)[: len(self.spectra)]
        self.dictionary[:, : len(kept)] = torch.cat(vectors)[kept].T.to(self.dictionary)
        self.spectra.zero_()
        self.spectra[torch.arange(len(kept)), owner[kept]] = eigenvalues[kept].to(self.spectra)


class _Classes(NamedTuple):
    """The classes that a whole batch holds."""

    present: Tensor  # (k,) which of the K
    counts: Tensor  # (k,) samples in each
    place: Tensor  # (m,) every sample's row in ``present``; -1 without a class

    @classmethod
    def of(
        cls, features: Tensor, labels: Tensor, num_classes: int, dp: Axis, num_samples: int
    ) -> _Classes:
        """features: own (m/dp, ·); labels: own (m/dp,)."""
        if labels.shape != features.shape[:1] or labels.is_floating_point():
            raise InputError(
                f"labels of shape {tuple(labels.shape)} and type {labels.dtype} for features of "
                f"shape {tuple(features.shape)}; give one integer for each sample"
            )
        labels = dp.gather(labels.to(features.device), num_samples).clamp(min=-1)
        if bool((labels >= num_classes).any()):
            raise InputError(
                f"a label of {int(labels.max())} among num_classes={num_classes}; count classes "
                "from 0, or raise num_classes"
            )
        present, place, counts = labels.unique(return_inverse=True, return_counts=True)
        known = present >= 0
        return cls(present[known], counts[known], place - int((~known).sum()))

    def split(self, rows: Tensor, place: Tensor) -> tuple[Tensor, ...]:
        """Each class' rows (n_k, ·) of ``rows`` (n, ·), whose ``place`` (n,) is given."""
        sizes = (place + 1).bincount(minlength=len(self.present) + 1).tolist()
        return rows[place.argsort(stable=True)].split(sizes)[1:]


def _squared_moments(z: Tensor, classes: _Classes, layout: Layout, m: int, d: int) -> Tensor:
    """Σ_k m_k ‖M_k‖_F², each class on its small side: ‖Z_kᵀZ_k‖ = ‖Z_kZ_kᵀ‖.

    min(m_k, d)² ≤ m_k d, so that all products together take no more memory than Z.
    """
    dp, tp = layout.samples, layout.features
    counts = classes.counts.tolist()
    place = own(classes.place, dp)
    own_rows = classes.split(z, place)
    value = z.new_zeros(())
    if any(n > d for n in counts):
        whole = classes.split(shared(joined(z, tp, d, dim=1), tp), place)  # (m_k/dp, d) each
        products = zip(own_rows, whole, counts, strict=True)
        moments = [a.T @ b / n**0.5 for a, b, n in products if n > d]  # (d/tp, d) each
        value = value + _sum_of_squares(moments, dp, tp)
    if any(n <= d for n in counts):
        everyone = classes.split(shared(joined(z, dp, m), dp), classes.place)  # (m_k, d/tp) each
        products = zip(own_rows, everyone, counts, strict=True)
        grams = [a @ b.T / n**0.5 for a, b, n in products if n <= d]  # (m_k/dp, m_k) each
        value = value + _sum_of_squares(grams, tp, dp)
    return value


def _sum_of_squares(blocks: list[Tensor], inner: Axis, outer: Axis) -> Tensor:
    """‖·‖_F² of matrices that are sums over ``inner``, own rows of them, summed over ``outer``."""
    entries = total(torch.cat([block.flatten() for block in blocks]), inner)
    return total(entries.square().sum(), outer)
