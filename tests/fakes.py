"""A process group of many ranks that are not there, whose calls are counted.

Tensors are fake too: shapes without numbers, in ``FakeGroup.tensors``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from dense2conv.parallel.mesh import Mesh

Calls = Counter  # of (kind, axis, bytes)


@dataclass
class FakeGroup:
    """The mesh, the mode that makes tensors fake, and the collectives called so far."""

    mesh: Mesh
    tensors: FakeTensorMode = field(default_factory=FakeTensorMode)
    calls: Calls = field(default_factory=Counter)


@contextmanager
def fake_group(sizes: tuple[int, int, int], rank: int) -> Iterator[FakeGroup]:
    """Rank ``rank`` of pp × dp × tp; to be called in a process that has no group of its own."""
    from torch.distributed import distributed_c10d
    from torch.distributed._tools import fake_collectives  # noqa: F401, gives them fake tensors
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from dense2conv.objectives import factorisation
    from dense2conv.parallel import collectives
    from dense2conv.parallel.mesh import make_mesh

    pp, dp, tp = sizes
    distributed_c10d.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=pp * dp * tp
    )
    group = FakeGroup(make_mesh(pp, dp, tp, torch.device("cpu")))
    axes = {
        getattr(axis, "group", None): name
        for name, axis in (("pp", group.mesh.pp), ("dp", group.mesh.dp), ("tp", group.mesh.tp))
    }

    def counted(function, kind):
        def call(tensor, *arguments, **options):
            axis = axes[options["group"]] if "group" in options else "pp"
            tensors = [tensor, *(t for t in arguments if isinstance(t, torch.Tensor))]
            group.calls[kind, axis, max(t.numel() * t.element_size() for t in tensors)] += 1
            return function(tensor, *arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        # An fp32 Gram matrix is too coarse for that many units: that, too, is what "no" says.
        patch.setattr(factorisation, "is_true", lambda fact: False)
        patch.setattr(dist, "all_reduce", counted(dist.all_reduce, "all_reduce"))
        patch.setattr(dist, "isend", counted(dist.isend, "send"))
        patch.setattr(dist, "recv", counted(dist.recv, "receive"))
        for kind in ("all_gather", "reduce_scatter"):
            patch.setattr(collectives, f"_{kind}", counted(getattr(collectives, f"_{kind}"), kind))
        yield group
    dist.destroy_process_group()
