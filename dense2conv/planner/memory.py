"""What a process holds of a training run, and when it holds the most."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise

from dense2conv.planner.share import LayerShare, Share

_MATRICES = 4  # at once, m×m or d×d: Gram matrix, Cholesky factor, inverse, its rows to be scaled
_FP64 = 8
_BATCHES_IN_FLIGHT = 2
_PROCESS = 100_000_000  # measured on a processor, at 64 to 134 M weights a process: 80 to 105 MB


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, the largest of its stage.

    weights, optimizer: from step to step. batch: while one is made. copies: weights as products take
    them, until backward is through. gradients, activations, gathered, gram, sending: in forward and
    backward. update: temporaries of the optimizer.
    checkpoint: the copy in host memory that is
    written while training goes on. process: library code in use and freed blocks that the
    allocator keeps, beyond what importing takes.
    """

    weights: int
    optimizer: int
    batch: int
    copies: int
    gradients: int
    activations: int
    gathered: int
    gram: int
    sending: int
    update: int
    checkpoint: int
    process: int = _PROCESS

    @property
    def state(self) -> int:
        """What lasts from step to step."""
        return self.weights + self.optimizer + self.process

    @property
    def step(self) -> int:
        """The most that a step holds: while a batch is made, at the last gradient, or in the update."""
        backward = self.copies + self.activations + self.gathered + self.gram + self.sending
        return self.state + max(self.batch, self.gradients + max(backward, self.update))

    def peak(self, devices_use_host_memory: bool) -> int:
        """The most that the device holds."""
        return self.step + (self.checkpoint if devices_use_host_memory else 0)

    def largest(self) -> str:
        """The name of the largest part of a step."""
        parts = {k: v for k, v in asdict(self).items() if k != "checkpoint"}
        return max(parts, key=lambda name: parts[name])


def memory(share: Share) -> Memory:
    """Bytes of the first process of a stage.

    Each layer's gradient stays until the step. Inputs and outputs of all held layers are counted as
    alive until the last gradient, as the first layer's are.
    """
    number, rows, weights = share.precision, share.num_rows, share.num_weights
    inputs = sum(_inputs(share, layer) for layer in share.layers) * number.compute
    outputs = sum(rows * layer.num_held for layer in share.layers) * number.compute
    working = max((_working(share, layer) for layer in share.coded), default=0)
    rates = [rate for layer in share.coded for rate in share.rates(layer)]
    gathered = max((rate.num_gathered for rate in rates), default=0) * share.gram_bytes[-1]
    small_side = max((rate.small_side for rate in rates), default=0)
    return Memory(
        weights=weights * number.master,
        optimizer=weights * share.states_per_weight * number.master,
        batch=_batch(share),
        copies=_copies(share),
        gradients=weights * number.master + _gradient(share),
        activations=inputs + outputs + working,
        gathered=gathered,
        gram=_MATRICES * _FP64 * small_side**2,
        sending=_sent(share),
        update=_update(share),
        checkpoint=_copied(share),
    )


def _inputs(share: Share, layer: LayerShare) -> int:
    """All of them, or own ones and what has come of others' weights for these, of every micro-batch."""
    if not share.exchanges(layer):
        return share.num_rows * layer.num_inputs
    columns = layer.num_units * share.mesh.microbatches
    return (share.num_rows + columns) * share.held(layer.num_inputs)


def _copies(share: Share) -> int:
    """Only gradients of inputs take them in backward; otherwise those of weights take their place."""
    if not share.has_copies or not share.is_network:
        return 0
    sizes = [x.num_weights * share.precision.compute for x in share.layers if x.index > 0]
    return max(sizes, default=0) if share.mesh.shard == "weights" else sum(sizes)


def _gradient(share: Share) -> int:
    """A layer's gradient before it is added to what lasts of it: of a copy, or of a piece."""
    sizes = [layer.num_weights for layer in share.layers]
    largest = max(sizes)
    number, several = share.precision, share.mesh.microbatches > 1
    if share.mesh.is_sharded:
        # While one is made that of the layer before leaves; those of all pieces are summed first.
        at_once = several and (share.is_first or not share.is_network)
        two = max(map(sum, pairwise(sizes)), default=largest)
        return (two + (largest if at_once else 0)) * number.compute
    of_copy = largest * number.compute if share.has_copies else 0
    return of_copy + (largest * number.master if several else 0)


def _working(share: Share, layer: LayerShare) -> int:
    """Outputs once more in one tensor, its gradient, and both in fp64 while the rate is made."""
    return share.num_rows * layer.num_held * (2 * share.precision.master + 2 * _FP64)


def _copied(share: Share) -> int:
    """Weights and optimizer state of the rows that this one of the dp ranks writes."""
    per_weight = (1 + share.states_per_weight) * share.precision.master
    rows = (math.ceil(layer.num_held / share.mesh.dp) * layer.num_inputs for layer in share.layers)
    return sum(rows) * per_weight


def _batch(share: Share) -> int:
    """The batch before, pixels, standardised pixels, noise, and their sum."""
    if not share.is_first:
        return 0
    numbers = share.num_rows * share.config.data.shape.numel
    return numbers * (4 * share.precision.master + share.pixel_bytes)


def _update(share: Share) -> int:
    """In torch's optimizers, the root of the second moment and the denominator, of a whole layer."""
    if share.config.optimizer.name == "prox_adam":
        return 0
    return 2 * max(layer.num_kept_weights for layer in share.layers) * share.precision.master


def _sent(share: Share) -> int:
    """Activations on their way to the next stage."""
    if share.is_last:
        return 0
    shown = share.num_rows * share.layers[-1].num_held * share.precision.compute
    return _BATCHES_IN_FLIGHT * shown
