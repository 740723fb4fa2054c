"""``dense2conv doctor``: what to know of a machine before a run is started on it."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dense2conv.bench.timing import interleaved, machine
from dense2conv.parallel import Mesh, ParallelConfig
from dense2conv.shapes import Axis, InputError

_PACKAGES = ("torch", "deepspeed", "fairscale", "hydra-core", "wandb", "safetensors", "numpy")
_REPEATS = 5
_DISK_BYTES = 64 * 2**20


@dataclass
class Doctor:
    """What ``dense2conv doctor`` looks at."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    root: str = field(default="runs", metadata={"help": "folder of all runs, whose disk is tried"})
    mebibytes: int = field(
        default=16, metadata={"help": "size of the tensor that is sent over each axis"}
    )

    def validate(self) -> None:
        """Raise InputError where a field cannot be."""
        self.parallel.validate_device()
        if self.mebibytes < 1:
            raise InputError(f"mebibytes={self.mebibytes}; use 1 or more")


def doctor(config: Doctor, mesh: Mesh) -> None:
    """Print versions, devices, where the processes are, each axis's speed, and the disk's.

    Raises:
        InputError: numbers that crossed an axis came out wrong, or nothing can be written.
    """
    hosts = mesh.gather_objects(f"{socket.gethostname()} {_device_name(mesh.device)}")
    lines = [*_software(), *_hardware(mesh), *_places(hosts)]
    for name in ("pp", "dp", "tp"):
        axis = getattr(mesh, name)
        if axis.size > 1:
            lines.append(_speed(name, axis, config.mebibytes * 2**20, mesh.device))
    if mesh.is_main:
        print("\n".join([*lines, _disk(Path(config.root))]))


def _software() -> Iterator[str]:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} MISSING")
    yield f"packages    {', '.join(found)}"
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        yield f"CUDA        {torch.version.cuda}, NCCL {nccl}"


def _hardware(mesh: Mesh) -> Iterator[str]:
    about = machine(mesh.device)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield f"machine     {about['processor']}, {about['cores']} cores, {memory:.0f} GiB"
    yield f"product     {about['matmul_gflops']:.0f} GFLOP/s in fp32, a process, {mesh.device.type}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _places(hosts: list[str]) -> Iterator[str]:
    """Which ranks are where; runs of ranks in one place are one line."""
    first = 0
    for rank, host in enumerate(hosts):
        if rank + 1 == len(hosts) or hosts[rank + 1] != host:
            ranks = f"rank {rank}" if rank == first else f"ranks {first}-{rank}"
            yield f"{ranks:11} {host}"
            first = rank + 1


def _speed(name: str, axis: Axis, num_bytes: int, device: torch.device) -> str:
    """Of a sum over an axis; every process calls it."""
    wanted = axis.size * (axis.size + 1) / 2
    large = torch.full((num_bytes // 4,), float(axis.rank + 1), device=device)
    if not bool((axis.sum(large.clone()) == wanted).all()):
        raise InputError(
            f"axis {name}: 1 + … + {axis.size} did not come out as {wanted:.0f} everywhere; check the "
            "network, the driver and NCCL (NCCL_DEBUG=INFO), or leave this node out"
        )
    small = torch.zeros(1, device=device)
    works = {"large": lambda: axis.sum(large), "small": lambda: axis.sum(small)}

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times = interleaved(works, _REPEATS, 60.0, synchronise)
    # What a ring sends of it, as NCCL's own tests count ("bus bandwidth").
    sent = 2 * (axis.size - 1) / axis.size * num_bytes
    rate, latency = sent / min(times["large"]) / 1e9, min(times["small"]) * 1e6
    return f"axis {name:6} {axis.size} processes, {rate:.2f} GB/s, {latency:.0f} µs for a small sum"


def _disk(root: Path) -> str:
    existing = next(folder for folder in [root, *root.absolute().parents] if folder.exists())
    path = existing / f".doctor-{os.getpid()}"
    try:
        began = time.perf_counter()
        with open(path, "wb") as file:
            file.write(bytes(_DISK_BYTES))
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - began
    except OSError as error:
        raise InputError(
            f"root={root}: nothing can be written there ({error.strerror}); choose another folder"
        ) from error
    finally:
        path.unlink(missing_ok=True)
    free = shutil.disk_usage(existing).free / 1e9
    return f"disk        {root}: {free:.0f} GB free, {_DISK_BYTES / seconds / 1e6:.0f} MB/s written"
