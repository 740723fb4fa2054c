"""The forward-only pipeline: a stage sends activations on and never waits for a gradient.

With layer-wise objectives nothing flows back, so a stage may run ahead of the next one by as many
batches as are in flight. Every process talks to the one with its own (dp, tp) place in the next
stage and sends its own shard of the units; the receiving tensor-parallel group gathers them.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from dense2conv.parallel.mesh import Mesh

_BATCHES_IN_FLIGHT = 2


class ForwardPipeline:
    """The two neighbours of a pipeline stage.

    Args:
        mesh: the mesh; with one stage there are no neighbours.
        microbatches: pieces of a batch that are sent one by one.
    """

    def __init__(self, mesh: Mesh, microbatches: int) -> None:
        stage, last = mesh.pp.rank, mesh.pp.size - 1
        self._previous = mesh.peer(stage - 1) if stage > 0 else None
        self._next = mesh.peer(stage + 1) if stage < last else None
        self._device = mesh.device
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._max_sent = _BATCHES_IN_FLIGHT * microbatches

    @property
    def is_first(self) -> bool:
        return self._previous is None

    def send(self, shard: Tensor) -> None:
        """Send to the next stage; waits only when too many batches are in flight."""
        while len(self._sent) >= self._max_sent:
            self._sent.popleft()[0].wait()
        shard = shard.contiguous()
        work = dist.isend(shard, self._next)
        assert work is not None
        self._sent.append((work, shard))  # the tensor must outlive the sending

    def receive(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The next piece from the previous stage."""
        shard = torch.empty(shape, dtype=dtype, device=self._device)
        dist.recv(shard, self._previous)
        return shard

    def drain(self) -> None:
        """Wait until everything sent has arrived."""
        while self._sent:
            self._sent.popleft()[0].wait()
