"""A run's whole configuration, typed: what Hydra composes and everything past it receives."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch

from dense2conv.data import DataConfig
from dense2conv.models import ModelConfig
from dense2conv.objectives import ObjectiveConfig
from dense2conv.parallel import ParallelConfig
from dense2conv.parallel.engines import DeepspeedConfig, validate_engine
from dense2conv.pruning import PruneConfig
from dense2conv.shapes import InputError
from dense2conv.structure import ExtractConfig
from dense2conv.training.checkpoint import CheckpointConfig
from dense2conv.training.metrics import LogConfig, TensorboardLog, WandbConfig
from dense2conv.training.optim import OptimizerConfig
from dense2conv.training.passwords import refuse_secrets
from dense2conv.training.run_folder import RunConfig
from dense2conv.training.tuning import TuneConfig

PHASES = ("prune", "extract", "report")
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass
class TrainConfig:
    """How long, on how much, in what precision."""

    steps: int = field(default=2500, metadata={"help": "optimizer steps in all"})
    batch: int = field(default=1024, metadata={"help": "images of the global batch"})
    dtype: str = field(default="float32", metadata={"help": "float32 | float64"})

    compute: str = field(
        default="same",
        metadata={"help": "precision of the products with weights: same (as dtype) | bfloat16"},
    )
    compile: bool = field(
        default=False,
        metadata={"help": "torch.compile fuses the optimizer's step and the non-linearities"},
    )

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.torch_dtype if self.compute == "same" else torch.bfloat16

    def validate(self) -> None:
        """Raise InputError where a field cannot be."""
        if self.dtype not in _DTYPES:
            raise InputError(f"train.dtype={self.dtype!r} is unknown; use {' or '.join(_DTYPES)}")
        if self.compute not in ("same", "bfloat16"):
            raise InputError(f"train.compute={self.compute!r} is unknown; use same or bfloat16")
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name}={getattr(self, name)}; use 1 or more")


@dataclass
class SweepConfig:
    """What the runs of ``train --multirun`` are compared by."""

    metric: str = field(
        default="objective",
        metadata={
            "help": "of train --multirun: the figure of summary.json or metrics.jsonl to compare"
        },
    )


@dataclass
class Config:
    """Everything about a run."""

    run: RunConfig = field(default_factory=RunConfig)
    seed: int = field(
        default=0, metadata={"help": "one seed for weights, batches and noise, on any mesh"}
    )
    resume: bool = field(
        default=False,
        metadata={"help": "carry on from the run's last good checkpoint, on any mesh"},
    )
    then: list[str] = field(
        default_factory=list,
        metadata={"help": "phases that follow training, e.g. then=[prune,extract,report]"},
    )
    profile: bool = field(
        default=False,
        metadata={"help": "rank 0 traces steps 6 to 8 of this start into trace.json (Perfetto)"},
    )
    engine: str = field(default="native", metadata={"help": "native | fairscale | deepspeed"})
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    deepspeed: DeepspeedConfig = field(default_factory=DeepspeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    log: LogConfig = field(default_factory=LogConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = field(
        default=False, metadata={"help": "also write TensorBoard's files, in tensorboard/"}
    )

    def validate(self) -> None:
        """Every rule that needs no process group, so that nothing starts in vain.

        Raises:
            InputError: the first rule that is broken, with the value and the remedy.
        """
        for group in (
            self.run,
            self.data,
            self.model,
            self.objective,
            self.optimizer,
            self.train,
            self.checkpoint,
            self.prune,
            self.extract,
            self.tune,
            self.log,
            self.wandb,
        ):
            group.validate()
        refuse_secrets(asdict(self))
        if self.tensorboard:
            TensorboardLog.require()
        self.parallel.validate(self.model.widths, self.train.batch)
        validate_engine(
            self.engine,
            self.deepspeed,
            self.parallel,
            self.model,
            self.objective,
            self.optimizer.name,
            self.train.torch_dtype,
            self.optimizer.clip,
            self.train.compute_dtype,
            self.train.compile,
        )
        if self.seed < 0:
            raise InputError(f"seed={self.seed}; use 0 or more")
        unknown = [phase for phase in self.then if phase not in PHASES]
        if unknown:
            raise InputError(
                f"then={unknown} is unknown; use some of {list(PHASES)}, in that order"
            )
