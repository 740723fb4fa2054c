"""What a plan is made for: a cluster, and how much of its published figures to count on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dense2conv.shapes import InputError
from dense2conv.training.config import Config


@dataclass
class ClusterConfig:
    """A node of a cluster, a file in ``conf/cluster/``; GB are 10⁹ bytes."""

    name: str = field(default="laptop", metadata={"help": "what the plan calls it"})
    devices: int = field(default=2, metadata={"help": "devices of a node, one process each"})
    memory_gb: float = field(default=8, metadata={"help": "memory of a device"})
    memory_gb_s: float = field(default=10, metadata={"help": "its bandwidth"})
    bfloat16_tflops: float = field(default=0.1, metadata={"help": "dense, without sparsity"})
    float32_tflops: float = field(default=0.1, metadata={"help": "as torch multiplies by default"})
    float64_tflops: float = field(
        default=0.05, metadata={"help": "with tensor cores if it has any"}
    )
    link_gb_s: float = field(
        default=1, metadata={"help": "between devices of a node: of a device, one direction"}
    )
    network_gb_s: float = field(
        default=0.1, metadata={"help": "between nodes: of a device, one direction"}
    )
    latency_us: float = field(default=100, metadata={"help": "of one collective"})
    cores: int = field(default=2, metadata={"help": "processor cores of a node"})
    images_per_core: dict[int, float] = field(
        default_factory=lambda: {32: 874, 64: 804, 224: 360},
        metadata={"help": "JPEG images a core decodes and crops in a second, by the crops' side"},
    )
    host_memory_gb: float = field(default=16, metadata={"help": "memory of a node's processors"})
    devices_use_host_memory: bool = field(
        default=True, metadata={"help": "whether the devices are the processors themselves"}
    )

    def images_per_core_at(self, side: int) -> float:
        """Images of a side: on a line through the nearest two measured ones, over log side."""
        sides = sorted(self.images_per_core)
        rates = [self.images_per_core[measured] for measured in sides]
        return float(np.interp(np.log(side), np.log(sides), rates))  # beyond the ends as there

    def validate(self) -> None:
        """Raise InputError for a number that is not positive."""
        rates = self.images_per_core
        if not rates or not all(side > 0 and rate > 0 for side, rate in rates.items()):
            raise InputError(
                f"cluster.images_per_core={rates}; give a positive rate for each of some sides, such as "
                "{64: 804}"
            )
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise InputError(f"cluster.{name}={value}; use a positive number")


@dataclass
class PlanConfig(Config):
    """A run's configuration, and where to run it.

    Of ``parallel`` the micro-batches count, and with ``mesh=given`` the mesh.
    """

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    nodes: int = field(default=1, metadata={"help": "nodes of the cluster"})
    mesh: str = field(
        default="best",
        metadata={
            "help": "best: rank all meshes of the cluster | given: parallel.pp × dp × tp alone"
        },
    )
    gram_dtype: str = field(
        default="float64",
        metadata={
            "help": "float64: digits are lost in float32 and the rate is made again, as for many units | "
            "float32"
        },
    )
    tp_across_nodes: bool = field(
        default=False, metadata={"help": "also plan tensor-parallel groups larger than a node"}
    )
    efficiency: float = field(
        default=0.5, metadata={"help": "share of the devices' FLOP/s and memory bandwidth reached"}
    )
    link_efficiency: float = field(
        default=0.7,
        metadata={"help": "share of the links' bandwidth reached; nothing is overlapped"},
    )
    usable_memory: float = field(
        default=0.9, metadata={"help": "share of the memory that tensors may take"}
    )
    normals_per_core: float = field(
        default=1.5e8, metadata={"help": "Gaussian numbers a core draws in a second (input noise)"}
    )
    runners_up: int = field(default=4, metadata={"help": "meshes shown behind the best one"})
    rehearse: bool = field(
        default=False,
        metadata={
            "help": "with mesh=given, also run a step of a process of each stage, its real code on tensors "
            "without numbers, and hold it against the plan"
        },
    )
    json: bool = field(default=False, metadata={"help": "print the plan as JSON"})

    def validate(self) -> None:
        """Raise InputError where the network, the objective or the cluster cannot be.

        Images are not asked for: a plan reads none.
        """
        for group in (self.model, self.objective, self.optimizer, self.train, self.cluster):
            group.validate()
        if self.engine != "native":
            raise InputError(f"engine={self.engine!r} cannot be planned for; use engine=native")
        if self.parallel.microbatches < 1:
            raise InputError(f"parallel.microbatches={self.parallel.microbatches}; use 1 or more")
        if self.nodes < 1:
            raise InputError(f"nodes={self.nodes}; use 1 or more")
        if self.mesh not in ("best", "given"):
            raise InputError(f"mesh={self.mesh!r} is unknown; use best or given")
        devices = self.nodes * self.cluster.devices
        if self.mesh == "given" and self.parallel.world_size != devices:
            raise InputError(
                f"{self.parallel.name} needs {self.parallel.world_size} processes, but "
                f"nodes={self.nodes} × cluster.devices={self.cluster.devices} are {devices}; "
                "change the mesh or those"
            )
        if self.rehearse and self.mesh != "given":
            raise InputError(
                f"rehearse=true with mesh={self.mesh}: one mesh is run; use mesh=given with parallel.pp, "
                "parallel.dp and parallel.tp, or rehearse=false"
            )
        if self.runners_up < 0:
            raise InputError(f"runners_up={self.runners_up}; use 0 or more")
        if self.gram_dtype not in ("float32", "float64"):
            raise InputError(f"gram_dtype={self.gram_dtype!r} is unknown; use float32 or float64")
        for name in ("efficiency", "link_efficiency", "usable_memory"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)}; use a share above 0, at most 1")
        if not self.normals_per_core > 0:
            raise InputError(f"normals_per_core={self.normals_per_core}; use a positive number")
