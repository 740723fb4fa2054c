"""The exact objective of a batch that goes through the network in pieces.

A rate is no mean over samples: the mean of the pieces' rates is another number, with another
gradient. So the features of all pieces are put together, the objective is taken once, and each piece
is handed its slice of ∂L/∂Z (the two phases of GradCache, Gao et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def whole_batch(pieces: Sequence[Tensor]) -> Iterator[Tensor]:
    """The features of all micro-batches as one leaf; on leaving, its gradient goes on through them.

    For pipelines and micro-batches whose graphs all fit in memory::

        pieces = [network(x) for x in microbatches]
        with whole_batch(pieces) as z:
            loss = -coding_rate(z, 0.5)
            loss.backward()

    Args:
        pieces: the micro-batches' features (m_i, d), with their graphs.
    """
    z = torch.cat([piece.detach() for piece in pieces]).requires_grad_()
    yield z
    assert z.grad is not None, "call backward on the loss inside the with block"
    lengths = [len(piece) for piece in pieces]
    torch.autograd.backward(pieces, z.grad.split(lengths))


def accumulate_gradients(
    network: Callable[[Tensor], Tensor],
    inputs: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
) -> Tensor:
    """Backward of ``loss`` of the whole batch's features, with the graph of one piece at a time.

    The network runs twice on every piece, so it has to give the same features both times: no
    dropout, no batch statistics.

    Args:
        network: inputs (m_i, D) → features (m_i, d); its parameters' gradients are added to.
        inputs: the pieces of the batch.
        loss: all features (m, d) → a scalar.

    Returns:
        The loss, detached.
    """
    with torch.no_grad():
        features = [network(x) for x in inputs]
    z = torch.cat(features).requires_grad_()
    value = loss(z)
    (gradient,) = torch.autograd.grad(value, z)
    for x, slope in zip(inputs, gradient.split([len(piece) for piece in features]), strict=True):
        torch.autograd.backward(network(x), slope)
    return value.detach()
