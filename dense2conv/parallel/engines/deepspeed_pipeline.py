"""DeepSpeed's pipeline under one objective of the whole network, its stages being the mesh's.

``PipelineModule`` takes the mean of the losses of its micro-batches, and a rate is no mean over
samples: a batch goes forward in one piece. A stage standardises it as in the native engine.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

from torch import Tensor, nn

from dense2conv.models.dense_stack import layer_name
from dense2conv.objectives import Terms
from dense2conv.parallel.engines.deepspeed import DeepspeedEngine, Stage


class DeepspeedPipelineEngine(DeepspeedEngine):
    """``DeepspeedEngine`` on several stages, what passes between them being DeepSpeed's, too."""

    def __init__(self, *share: Any, **config: Any) -> None:
        super().__init__(*share, **config)
        from deepspeed.runtime.pipe.schedule import OptimizerStep

        # Its schedule ends in the step, whose learning rate is not known before ``step``.
        instructions = {**self.deepspeed._INSTRUCTION_MAP, OptimizerStep: lambda _: None}
        self.deepspeed._INSTRUCTION_MAP = instructions

    def _model(self) -> tuple[nn.Module, Any]:
        import deepspeed
        from deepspeed.pipe import PipelineModule
        from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

        deepspeed.init_distributed()
        pp, dp, tp = self.mesh.pp, self.mesh.dp, self.mesh.tp
        stages: list[nn.Module] = [nn.Identity() for _ in range(pp.size)]  # others hold theirs
        stages[pp.rank] = Stage(self.stack, self._through)
        with contextlib.redirect_stdout(io.StringIO()):
            pipeline = PipelineModule(
                stages,
                topology=PipeModelDataParallelTopology(pp.size, tp.size, dp.size),
                loss_fn=self._loss_of_output,
                partition_method="uniform",
            )
        return pipeline, None  # it makes its own groups

    def forward_backward(self, x: Tensor | None) -> dict[str, Terms]:
        self.deepspeed.train_batch(iter([(x, None)]))
        return self.terms

    def take_seconds_waited(self) -> None:
        return None  # DeepSpeed does the waiting

    def _through(self, x: Tensor) -> Tensor:
        """What the stage's last layer shows the next stage, or its output (m/dp, d/tp)."""
        for i in self.stack.indices:
            (x,) = self._layer(i, [x], [])
        return x

    def _loss_of_output(self, z: Tensor, _: None) -> Tensor:
        (top,) = self.coded
        loss, self.terms[layer_name(top)] = self.code(top, z)
        return loss * self.mesh.dp.size  # as in one stage, it takes the mean over dp

    def _step(self) -> None:
        self.deepspeed._exec_optimizer_step()
