"""What an engine does, which there are, and which combinations are refused.

Nothing here imports an engine's package: the engine that is chosen does, when it is made.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from dense2conv.models import DenseStack, ModelConfig
from dense2conv.objectives import EfficientCoding, ObjectiveConfig, Terms
from dense2conv.parallel.mesh import Mesh, ParallelConfig
from dense2conv.shapes import InputError

ENGINES = ("native", "fairscale", "deepspeed")
# A weight's step depends on its own gradients alone, so it is the same in any flat shard. Adagrad
# would be one too, but DeepSpeed replaces it by another without the proximal step.
_ELEMENTWISE = (
    "ASGD",
    "Adadelta",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)


class Engine(Protocol):
    """Forward, backward and step of one process's share of the network.

    It owns the gradients from ``forward_backward`` to ``step``; every process calls its methods in
    the same order.
    """

    @property
    def takes_images(self) -> bool:
        """Whether this process feeds the first layer."""
        ...

    def forward_backward(self, x: Tensor | None) -> dict[str, Terms]:
        """Make the gradients of the held weights: those of the whole batch's objective.

        Args:
            x: (m/dp, D), own samples of the batch; None where ``takes_images`` is False.

        Returns:
            The terms of the held layers' objectives in nats a unit, by name.
        """
        ...

    def step(self, learning_rate: float) -> None:
        """Clip, step, proximal step, masks; the gradients are used up."""
        ...

    def whole(self, with_optimizer: bool = False) -> AbstractContextManager[None]:
        """A block in which the held units' weights, and the optimizer's state of them, can be read.

        Outside, an engine may keep them in other pieces; all processes enter the block together.
        """
        ...

    def drain(self) -> None:
        """Wait until everything sent has arrived."""
        ...

    def take_seconds_waited(self) -> float | None:
        """Seconds since the last call spent waiting for other stages; None where nobody counts."""
        ...


@dataclass
class DeepspeedConfig:
    """What ``engine=deepspeed`` shards over the data-parallel processes."""

    zero: int = field(
        default=1,
        metadata={
            "help": "ZeRO stage: 0 nothing | 1 optimizer state | 2 and gradients | 3 and weights; "
            "0 or 1 with parallel.pp"
        },
    )
    offload: bool = field(
        default=False, metadata={"help": "keep the optimizer's state, and its step, on the CPU"}
    )


def validate_engine(
    name: str,
    deepspeed: DeepspeedConfig,
    parallel: ParallelConfig,
    model: ModelConfig,
    objective: ObjectiveConfig,
    optimizer: str,
    dtype: torch.dtype,
    clip: float | None = None,
    compute: torch.dtype | None = None,
    compiled: bool = False,
) -> None:
    """Raise InputError for an engine that is unknown, or would compute something else than asked."""
    if name not in ENGINES:
        raise InputError(f"engine={name!r} is unknown; use one of {', '.join(ENGINES)}")
    if clip is not None and not clip > 0:
        raise InputError(f"optimizer.clip={clip}; use a positive number, or null for no clipping")
    if parallel.shard != "none" and objective.noise_correction:
        raise InputError(
            f"parallel.shard={parallel.shard} with objective.noise_correction=true: the term takes all "
            "rows of a process's share at once; use parallel.shard=none"
        )
    if name != "native":
        others = {
            "parallel.shard": parallel.shard != "none",
            "train.compute": compute not in (None, dtype),
            "train.compile": compiled,
        }
        for key in (key for key, is_set in others.items() if is_set):
            raise InputError(f"{key} is set with engine={name}, which has none; use engine=native")
    if name == "fairscale":
        _validate_fairscale(parallel, model)
    if name == "deepspeed":
        _validate_deepspeed(deepspeed, parallel, model, objective, optimizer, dtype, clip)


def _validate_fairscale(parallel: ParallelConfig, model: ModelConfig) -> None:
    if parallel.pp > 1:
        raise InputError(
            f"parallel.pp={parallel.pp} with engine=fairscale: its layers know no pipeline; use "
            "engine=native, or parallel.pp=1"
        )
    uneven = [width for width in model.widths if width % parallel.tp]
    if uneven:
        raise InputError(
            f"model.widths={model.widths} with engine=fairscale: its layers split units evenly, and "
            f"{uneven[0]} do not divide by parallel.tp={parallel.tp}; use engine=native, or multiples"
        )


def _validate_deepspeed(
    config: DeepspeedConfig,
    parallel: ParallelConfig,
    model: ModelConfig,
    objective: ObjectiveConfig,
    optimizer: str,
    dtype: torch.dtype,
    clip: float | None,
) -> None:
    zero = f"deepspeed.zero={config.zero}"
    if config.zero not in range(4):
        raise InputError(f"{zero} is no stage of ZeRO; use 0, 1, 2 or 3")
    if parallel.pp > 1:
        _validate_deepspeed_pipeline(config, parallel, model, objective)
    tp = parallel.tp
    short = [width for width in model.widths if math.ceil(width / tp) * (tp - 1) >= width]
    if config.zero == 3 and short:
        raise InputError(
            f"parallel.tp={tp} with {zero}: of a layer of {short[0]} units the last process holds none, "
            "and DeepSpeed never takes an empty weight for gathered; use deepspeed.zero=2 or less, "
            "another parallel.tp, or wider layers"
        )
    if config.offload and config.zero == 0:
        raise InputError(
            "deepspeed.offload=true with deepspeed.zero=0: there is no sharded state to keep on the "
            "CPU; use deepspeed.zero=1 or more"
        )
    if config.zero > 0 and optimizer not in _ELEMENTWISE:
        raise InputError(
            f"optimizer.name={optimizer} with {zero}: shards are flat and cut through rows, whose "
            f"figures it needs; use an elementwise one ({', '.join(_ELEMENTWISE)}), or "
            "deepspeed.zero=0"
        )
    if dtype != torch.float32:
        raise InputError(
            f"train.dtype={str(dtype).removeprefix('torch.')} with engine=deepspeed: its own weights "
            "and sums are float32; use train.dtype=float32, or engine=native"
        )
    if clip is not None and objective.scope == "layerwise" and len(model.widths) > 1:
        raise InputError(
            f"optimizer.clip={clip} with engine=deepspeed: it clips by one norm of all layers, and "
            "layer-wise objectives by one a layer; use objective.scope=network, or engine=native"
        )


def _validate_deepspeed_pipeline(
    config: DeepspeedConfig,
    parallel: ParallelConfig,
    model: ModelConfig,
    objective: ObjectiveConfig,
) -> None:
    stages = f"parallel.pp={parallel.pp} with engine=deepspeed"
    if objective.scope != "network":
        raise InputError(
            f"objective.scope={objective.scope} and {stages}: its pipeline differentiates one loss, on "
            "the last stage; use objective.scope=network, or engine=native"
        )
    if parallel.microbatches > 1:
        raise InputError(
            f"parallel.microbatches={parallel.microbatches} and {stages}: it takes the mean of the "
            "micro-batches' losses, and the rate is one number of the whole batch; use "
            "parallel.microbatches=1, or engine=native"
        )
    if config.zero > 1:
        raise InputError(
            f"deepspeed.zero={config.zero} and {stages}: beside its pipeline DeepSpeed shards the "
            "optimizer's state alone; use deepspeed.zero=1 or 0, or parallel.pp=1"
        )
    if config.zero == 1 and len(model.widths) % parallel.pp:
        raise InputError(
            f"deepspeed.zero=1 and {stages}: it sums the norm of a gradient over all stages layer by "
            f"layer, and the {len(model.widths)} of model.widths={model.widths} do not divide by their "
            "number, so that one would wait for ever; use deepspeed.zero=0, or another parallel.pp"
        )


def make_engine(
    name: str,
    deepspeed: DeepspeedConfig,
    mesh: Mesh,
    stack: DenseStack,
    objective: EfficientCoding,
    optimizer: Optimizer,
    batch: int,
    microbatches: int = 1,
    clip: float | None = None,
    compute: torch.dtype | None = None,
    regather: bool = False,
    compiled: bool = False,
) -> Engine:
    """The engine ``name``, which ``validate_engine`` let pass, on the stack and optimizer as they are.

    Args:
        name: one of ``ENGINES``.
        deepspeed: for the engine of that name.
        mesh, stack, objective, optimizer, batch, microbatches, clip: see ``NativeEngine``.
        compute, regather, compiled: see there, too; the other engines know none of them.
    """
    share = (mesh, stack, objective, optimizer, batch, microbatches, clip)
    if name == "deepspeed":
        from dense2conv.parallel.engines.deepspeed import DeepspeedEngine

        if mesh.pp.size > 1:
            from dense2conv.parallel.engines.deepspeed_pipeline import DeepspeedPipelineEngine

            return DeepspeedPipelineEngine(*share, config=deepspeed)
        return DeepspeedEngine(*share, config=deepspeed)
    if name == "fairscale":
        from dense2conv.parallel.engines.fairscale import FairscaleEngine

        return FairscaleEngine(*share)
    from dense2conv.parallel.engines.native import NativeEngine

    return NativeEngine(*share, compute, regather, compiled)
