"""The pipeline: a stage sends activations on, and gradients back where the objective asks for them.

With layer-wise objectives nothing flows back, so a stage may run ahead of the next one by as many
batches as are in flight. With one objective at the top all pieces go forward, then all gradients
back. Every process talks to the ones with its own (dp, tp) place in the neighbouring stages and
sends its own shard of the units; the receiving tensor-parallel group gathers them.

``torch.distributed.pipelining`` sends a micro-batch on as soon as a stage's module has seen it
alone, and takes a loss of each. Here a stage standardises by the whole batch before it sends, and
the rate is one number of the whole batch, so sends and receives are our own.
"""

from __future__ import annotations

import time
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from dense2conv.parallel.mesh import Mesh

_BATCHES_IN_FLIGHT = 2


class Pipeline:
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
        self._waited = 0.0

    @property
    def is_first(self) -> bool:
        return self._previous is None

    @property
    def is_last(self) -> bool:
        return self._next is None

    def send(self, shard: Tensor) -> None:
        """Send to the next stage; waits only when too many pieces are in flight."""
        self._send(shard, self._next)

    def receive(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The next piece from the previous stage."""
        return self._receive(torch.empty(shape, dtype=dtype, device=self._device), self._previous)

    def send_gradient(self, gradient: Tensor) -> None:
        """Send ∂L of a received piece to the previous stage."""
        self._send(gradient, self._previous)

    def receive_gradient(self, sent: Tensor) -> Tensor:
        """∂L of the earliest sent piece, whose gradient is not here yet; like ``sent``."""
        return self._receive(torch.empty_like(sent), self._next)

    def drain(self) -> None:
        """Wait until everything sent has arrived."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def take_seconds_waited(self) -> float:
        """Seconds since the last call in which this process waited for a neighbour.

        On a GPU sends and receives wait on its own queue, which this does not see.
        """
        waited, self._waited = self._waited, 0.0
        return waited

    def _send(self, tensor: Tensor, peer: int | None) -> None:
        began = time.monotonic()
        while len(self._sent) >= self._max_sent:
            self._sent.popleft()[0].wait()
        self._waited += time.monotonic() - began
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, peer)
        assert work is not None
        self._sent.append((work, tensor))  # the tensor must outlive the sending

    def _receive(self, tensor: Tensor, peer: int | None) -> Tensor:
        began = time.monotonic()
        dist.recv(tensor, peer)
        self._waited += time.monotonic() - began
        return tensor
