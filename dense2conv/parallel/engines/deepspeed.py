"""DeepSpeed's ZeRO on the data-parallel axis: optimizer state, gradients and weights in shards.

It shards the units that are here, so layers spread over tp, whose traffic is their own, compose with
it. A shard is a flat run of numbers that cuts through rows, so optimizer and proximal step must be
elementwise. The soft threshold in the Euclidean metric is, and runs behind the optimizer's step on
the shard, before DeepSpeed gathers the weights.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense2conv.models import DenseStack
from dense2conv.models.dense_stack import layer_name
from dense2conv.objectives import Terms
from dense2conv.parallel.engines.engine import DeepspeedConfig
from dense2conv.parallel.engines.native import NativeEngine
from dense2conv.parallel.mesh import Mesh
from dense2conv.shapes import WHOLE

State = dict[Tensor, dict[str, Tensor]]  # of an optimizer, by parameter


class DeepspeedEngine(NativeEngine):
    """``NativeEngine`` on one pipeline stage, its gradients and step being DeepSpeed's.

    Every process holds the weights of its units when it is made; with ZeRO 3 no longer.
    """

    def __init__(self, *share: Any, config: DeepspeedConfig) -> None:
        super().__init__(*share)
        # Otherwise it takes any GPU it sees, and prints which.
        os.environ.setdefault("DS_ACCELERATOR", self.mesh.device.type)
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # It calls collectives by names that torch 2.13 deprecates, at every step.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        deepspeed.ops.__compatible_ops__ = {}  # on a CPU it compiles collectives of its own
        self.zero, self.terms = config.zero, dict[str, Terms]()
        for parameter in self.stack.parameters():
            # Units, and their biases, are one process's of a tp group or pipeline, and no copies: the
            # norm of all gradients counts each of them.
            parameter.model_parallel = True  # type: ignore[attr-defined]
        model, mpu = self._model()
        state = self._take_state() if self.zero else {}
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            mpu=mpu,
            optimizer=self.optimizer,
            config={
                "train_micro_batch_size_per_gpu": len(self.mesh.dp.shard(self.batch)),
                "gradient_accumulation_steps": 1,
                "gradient_clipping": self.clip or 0.0,  # 1 where it is left out
                "zero_optimization": {
                    "stage": self.zero,
                    "offload_optimizer": {"device": "cpu" if config.offload else "none"},
                    "stage3_param_persistence_threshold": 0,  # it would keep small weights whole
                },
                # What the processes of a tp group send on it takes for copies, and would cut up.
                "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
                "zero_allow_untested_optimizer": True,
                # Its own CPU optimizer would have to be compiled, and knows no proximal step.
                "zero_force_ds_cpu_optimizer": False,
            },
        )
        if state:
            self._shard_state(state)

    def _model(self) -> tuple[nn.Module, Any]:
        """What DeepSpeed runs, and the groups that it communicates in."""
        return Stage(self.stack, self._loss), _Groups(self.mesh)

    def forward_backward(self, x: Tensor | None) -> dict[str, Terms]:
        # Gradients of the shares of a batch add up to the whole batch's; DeepSpeed takes their mean.
        self.deepspeed.backward(self.deepspeed(x) * self.mesh.dp.size)
        return self.terms

    def _loss(self, x: Tensor) -> Tensor:
        """The loss of all layers, to be differentiated once; keeps their terms."""
        outputs, _ = self.forward(self.pieces(x))
        losses = []
        for i in self.coded:
            loss, self.terms[layer_name(i)] = self.code(i, torch.cat(outputs[i]))
            losses.append(loss)
        return torch.stack(losses).sum()

    def _parameters(self, i: int) -> tuple[Tensor, Tensor | None]:
        # Left to the layer, in whose call ZeRO 3 gathers them: what is read outside of it, it keeps
        # together from the first layer's forward on.
        return torch.empty(0), None

    def linear(self, i: int, x: Tensor, *_: Any) -> Tensor:
        output: Tensor = self.stack.layer(i)(x, WHOLE if i == 0 else self.mesh.tp)
        return output

    def step(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._step()
        # Its own copy of a pruned weight moves on, which no other weight sees.
        if any(self.stack.layer(i).mask is not None for i in self.stack.indices):
            with self._gathered(written_by=0):
                self.apply_masks()

    def _step(self) -> None:
        self.deepspeed.step()

    @contextmanager
    def whole(self, with_optimizer: bool = False) -> Iterator[None]:
        with self._gathered():
            if with_optimizer and self.zero:
                self.optimizer.state.update(self._whole_state())
            yield
        if with_optimizer and self.zero:
            self._take_state()

    def _gathered(self, written_by: int | None = None) -> Any:
        from deepspeed.runtime.zero import GatheredParameters

        parameters = list(self.stack.parameters())
        return GatheredParameters(parameters, modifier_rank=written_by, enabled=self.zero == 3)

    def _take_state(self) -> State:
        """Take the optimizer's states of whole parameters out of it: ZeRO knows its shards alone."""
        state = self.optimizer.state
        return {p: state.pop(p) for p in self.stack.parameters() if p in state}

    def _whole_state(self) -> State:
        """The optimizer's state of every parameter, from all shards."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_state()
        shards: Iterator[dict[str, Tensor]] = iter(self.optimizer.state.values())
        shard = {k: v for k, v in next(shards, {}).items() if isinstance(v, Tensor)}
        return {
            p: {
                key: safe_get_full_optimizer_state(p, key) if value.ndim else value.clone()
                for key, value in shard.items()
            }
            for p in self.stack.parameters()
        }

    def _shard_state(self, whole: State) -> None:
        """Put states of whole parameters, from a checkpoint, into the shards."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        optimizer = self.deepspeed.optimizer
        example = next(iter(whole.values()))
        shards = (
            optimizer.fp32_partitioned_groups_flat
            if self.zero == 3
            else optimizer.single_partition_of_fp32_groups
        )
        for shard in shards:
            self.optimizer.state[shard] = {
                key: torch.zeros_like(shard) if value.ndim else value.clone()
                for key, value in example.items()
            }
        self._link_state()
        for p, state in whole.items():
            for key, value in state.items():
                if value.ndim == 0:
                    continue
                if self.zero < 3:
                    safe_set_full_optimizer_state(p, value, key)
                else:  # shards are of one length, padded at the end
                    length = p.ds_tensor.numel()  # type: ignore[attr-defined]
                    padded = F.pad(value.flatten(), (0, self.mesh.dp.size * length - value.numel()))
                    safe_set_local_optimizer_state(
                        p, padded.narrow(0, self.mesh.dp.rank * length, length), key
                    )

    def _link_state(self) -> None:
        """Tell DeepSpeed where a parameter's state lies: it looks once, after one group's first step."""
        if self.zero < 3:
            self.deepspeed.optimizer._hp_optimizer_states_linked = False
            self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()


class Stage(nn.Module):
    """The held layers and what is done with them, as DeepSpeed wants it: one module to call."""

    def __init__(self, stack: DenseStack, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stack, self._forward = stack, forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x)


class _Groups:
    """The mesh as Megatron's ``mpu``, which DeepSpeed asks for its groups."""

    def __init__(self, mesh: Mesh) -> None:
        tp, dp = mesh.device_mesh["tp"], mesh.device_mesh["dp"]
        self.get_model_parallel_group = tp.get_group
        self.get_model_parallel_rank = tp.get_local_rank
        self.get_model_parallel_world_size = tp.size
        self.get_data_parallel_group = dp.get_group
        self.get_data_parallel_rank = dp.get_local_rank
        self.get_data_parallel_world_size = dp.size
