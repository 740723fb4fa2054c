"""FairScale's tensor-parallel layers under the same objective: an independent oracle for parity.

Only ``ColumnParallelLinear`` can train here: it splits a layer by units, so that every unit's
receptive field is whole on one process, which the row-wise optimizer, pruning and extraction rely
on; ``RowParallelLinear`` splits it by inputs. FairScale is frozen since 2025.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

from fairscale.nn.model_parallel import initialize
from fairscale.nn.model_parallel.layers import ColumnParallelLinear
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region
from torch import Tensor, nn

from dense2conv.models.dense_stack import DenseLayer
from dense2conv.parallel.engines.native import NativeEngine


class FairscaleEngine(NativeEngine):
    """``NativeEngine`` on one pipeline stage, its layers and their traffic being FairScale's."""

    def __init__(self, *share: Any) -> None:
        super().__init__(*share)
        initialize.destroy_model_parallel()  # an earlier mesh's
        with contextlib.redirect_stdout(io.StringIO()):
            initialize.initialize_model_parallel(self.mesh.tp.size)
        self.linears = [_Column(self.stack.layer(i)) for i in self.stack.indices]

    def linear(self, i: int, x: Tensor, *_: Any) -> Tensor:
        output: Tensor = self.linears[i](x if i == 0 else gather_from_model_parallel_region(x))
        return output


class _Column(ColumnParallelLinear):
    """FairScale's layer on the shard that is here; its own init, left out, builds the whole weight."""

    def __init__(self, layer: DenseLayer) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.gather_output = layer.weight, layer.bias, False
