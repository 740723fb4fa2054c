"""The variational information bottleneck: a code that tells the label and little else of the input.

Alemi, Fischer, Dillon & Murphy, "Deep Variational Information Bottleneck" (ICLR 2017).

    m   samples, spread over ``layout.samples`` (dp)     d   units of the code, over ``layout.features``
    K   classes

The encoder is q(z|x) = N(mean, exp(log_variance)), the decoder q(y|z) a softmax of logits, and the
code's marginal is taken to be N(0, I).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense2conv.objectives.checks import require_finite
from dense2conv.objectives.precision import in_full
from dense2conv.objectives.sums import global_shape, total
from dense2conv.rng import normal_rows
from dense2conv.shapes import SINGLE, InputError, Layout


class BottleneckTerms(NamedTuple):
    """Means over the whole batch, in nats; scalars, the same on every process.

    The bounds hold for the distribution that the batch itself is, in the mean over the noise.
    """

    cross_entropy: Tensor  # E −log q(y|z)
    kl: Tensor  # E KL(q(z|x) ‖ N(0, I))
    label_entropy: Tensor  # H(Y) of the batch's labels
    loss: Tensor  # cross_entropy + β kl, to be minimised

    @property
    def label_information_lower_bound(self) -> Tensor:
        """H(Y) − cross_entropy ≤ I(Z;Y), equal for the decoder q(y|z) = p(y|z)."""
        return self.label_entropy - self.cross_entropy

    @property
    def input_information_upper_bound(self) -> Tensor:
        """E KL(q(z|x) ‖ N(0, I)) ≥ I(X;Z), equal where the code's marginal is N(0, I)."""
        return self.kl


def code_noise(
    name: tuple[int, ...], num_samples: int, num_features: int, layout: Layout = SINGLE
) -> Tensor:
    """Own block (m/dp, d/tp) of standard normal numbers (m, d) that are the same on any mesh.

    name: the stream, such as ``(seed, rng.NOISE, step)``. Float32, on the CPU.
    """
    own_units = layout.features.shard(num_features)
    rows = normal_rows(name, layout.samples.shard(num_samples), num_features)  # (m/dp, d)
    return rows[:, own_units.start : own_units.stop]


def reparameterised(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """A sample of q(z|x), mean + exp(½ log_variance) · noise; all of one shape."""
    return mean + (0.5 * log_variance).exp() * noise


def vib_loss(
    mean: Tensor,
    log_variance: Tensor,
    logits: Tensor,
    labels: Tensor,
    beta: float,
    layout: Layout = SINGLE,
    num_samples: int | None = None,
    name: str = "the layer",
) -> BottleneckTerms:
    """E −log q(y|z) + β E KL(q(z|x) ‖ N(0, I)) of the whole batch, and its terms.

    KL = ½ Σ_units (mean² + variance − log variance − 1).

    Args:
        mean, log_variance: (m/dp, d/tp), own block of the encoder's output.
        logits: (m/dp, K), the decoder's output for the sampled codes, the same along tp.
        labels: (m/dp,) integers from 0 to K−1.
        beta: β, the price of a nat about the input, 0 or more. From β = 1 a collapsed code is
            optimal, since I(Z;Y) ≤ I(X;Z).
        layout: how the encoder's output is spread.
        num_samples: m, where the caller knows it; otherwise it is summed.
        name: whose code this is, for error messages.

    Returns:
        The terms, in fp32 at least, differentiable twice.

    Raises:
        InputError: β is negative, the shapes disagree, or a label is not a class.
        ValueError: a term is NaN or infinite.

    Source:
        Alemi et al. (2017), equation 17.
    """
    _require_beta(beta)
    _require_shapes(mean, log_variance, logits, labels)
    mean, log_variance, logits = (in_full(t)[0] for t in (mean, log_variance, logits))
    m, num_classes = global_shape(logits, Layout(samples=layout.samples), num_samples)

    counts = _label_counts(labels, num_classes, layout, m)  # (K,)
    label_entropy = torch.special.entr(counts / m).sum().to(logits.dtype)
    surprise = F.cross_entropy(logits, labels.long(), reduction="sum")
    cross_entropy = total(surprise, layout.samples) / m
    divergence = 0.5 * (mean.square() + log_variance.expm1() - log_variance).sum()
    kl = total(divergence, layout.samples, layout.features) / m
    loss = require_finite(cross_entropy + beta * kl, name)
    return BottleneckTerms(cross_entropy, kl, label_entropy, loss)


class VariationalInformationBottleneck(nn.Module):
    """The loss of :func:`vib_loss` for one β, to be minimised."""

    def __init__(self, beta: float) -> None:
        _require_beta(beta)
        super().__init__()
        self.beta = beta

    def forward(
        self,
        mean: Tensor,
        log_variance: Tensor,
        logits: Tensor,
        labels: Tensor,
        layout: Layout = SINGLE,
        num_samples: int | None = None,
        name: str = "the layer",
    ) -> Tensor:
        """A scalar, in nats a sample."""
        return vib_loss(
            mean, log_variance, logits, labels, self.beta, layout, num_samples, name
        ).loss


def _label_counts(labels: Tensor, num_classes: int, layout: Layout, num_samples: int) -> Tensor:
    """How many samples of the whole batch bear each label: (K,) fp64."""
    labels = labels[(labels >= 0) & (labels < num_classes)].long()
    counts = total(torch.bincount(labels, minlength=num_classes).double(), layout.samples)
    # From the sum, so that a wrong label on one process is an error on all of them.
    if (strangers := num_samples - int(counts.sum())) != 0:
        raise InputError(
            f"{strangers} of {num_samples} labels are not among the logits' classes "
            f"0 … {num_classes - 1}; relabel them, or give the decoder more outputs"
        )
    return counts


def _require_beta(beta: float) -> None:
    if not beta >= 0:
        raise InputError(f"beta={beta}; use 0 or more")


def _require_shapes(mean: Tensor, log_variance: Tensor, logits: Tensor, labels: Tensor) -> None:
    if mean.ndim != 2 or mean.shape != log_variance.shape:
        raise InputError(
            f"the encoder's mean is {tuple(mean.shape)} and its log-variance "
            f"{tuple(log_variance.shape)}; give both as (samples, units)"
        )
    if logits.ndim != 2 or labels.ndim != 1 or not len(mean) == len(logits) == len(labels):
        raise InputError(
            f"the logits are {tuple(logits.shape)} and the labels {tuple(labels.shape)}; with "
            f"{len(mean)} codes give ({len(mean)}, classes) and ({len(mean)},)"
        )
    if labels.is_floating_point():
        raise InputError(f"the labels are {labels.dtype}; give integers, one class a sample")
