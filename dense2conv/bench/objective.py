"""``dense2conv bench objective``: rates and rate reduction, forward and backward, beside others'."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm import tqdm

from dense2conv.bench import rivals
from dense2conv.bench.timing import Ratio, Work, aligned, interleaved, machine, peak_bytes, plain
from dense2conv.files import write_atomically
from dense2conv.objectives import coding_rate, on_sphere, rate_reduction
from dense2conv.parallel import Mesh, ParallelConfig
from dense2conv.shapes import SINGLE, InputError
from dense2conv.training.run_folder import RunConfig, RunFolder


def _run() -> RunConfig:
    return RunConfig(name="bench-objective", existing="keep_aside")


@dataclass
class ObjectiveBench:
    """What ``dense2conv bench objective`` measures."""

    run: RunConfig = field(default_factory=_run)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    shapes: list[list[int]] = field(
        default_factory=lambda: [[1000, 128], [2000, 512], [1000, 4096]],
        metadata={"help": "[samples, features] of each row, on one process"},
    )
    classes: list[int] = field(
        default_factory=lambda: [10, 100],
        metadata={"help": "numbers of classes; the first is held beside the form in print"},
    )
    sharded: list[list[int]] = field(
        default_factory=lambda: [[1024, 16384]],
        metadata={"help": "[samples, features] of each row on several processes (parallel.tp=2)"},
    )
    pairs: int = field(default=15, metadata={"help": "rounds in which all candidates take turns"})
    seconds: float = field(
        default=120.0, metadata={"help": "stop a row's rounds then, though not before three"}
    )
    threads: int = field(default=1, metadata={"help": "threads of each process"})
    epsilon_squared: float = field(default=0.5, metadata={"help": "ε², the distortion"})
    seed: int = field(default=0, metadata={"help": "of the features"})

    def validate(self) -> None:
        """Raise InputError where a field cannot be."""
        self.run.validate()
        self.parallel.validate_device()
        for name in ("shapes", "sharded"):
            for shape in getattr(self, name):
                if len(shape) != 2 or min(shape) < 1:
                    raise InputError(f"{name} holds {shape}; give [samples, features] a row")
        if not self.classes or min(self.classes) < 1:
            raise InputError(f"classes={self.classes}; give positive numbers, e.g. [10,100]")
        if self.pairs < 3:
            raise InputError(f"pairs={self.pairs}; use 3 or more, 15 for an interval")
        if self.parallel.dp * self.parallel.pp > 1:
            raise InputError(
                f"parallel.dp={self.parallel.dp} parallel.pp={self.parallel.pp}: this benchmark "
                "shards features alone; use parallel.tp"
            )


def bench_objective(config: ObjectiveBench, mesh: Mesh) -> None:
    """Measure, print one table, and write it to ``result.json`` in the run's folder."""
    torch.set_num_threads(config.threads)
    folder = RunFolder(config.run.folder)
    if mesh.is_main:
        folder.create(config.run, resume=False)
    if mesh.tp.size > 1:
        rows = [_sharded(config, mesh, *shape) for shape in config.sharded]
    else:
        rows = []
        for shape in tqdm(config.shapes, desc="bench", unit="shape", disable=None, leave=False):
            rows += _single(config, mesh.device, *shape)
    if not mesh.is_main:
        return
    about = machine(mesh.device) | {"processes": mesh.tp.size}
    for row in rows:
        if "gflop" in row:
            row["of_matmul_rate"] = row["gflop"] / row["seconds"] / about["matmul_gflops"]
    plain_rows = [{key: plain(value) for key, value in row.items()} for row in rows]
    result = {"benchmark": "objective", "machine": about, "rows": plain_rows}
    path = folder.path / "result.json"
    write_atomically(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(_table(rows, about))
    print(path)


def _features(config: ObjectiveBench, m: int, d: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(config.seed)
    return on_sphere(torch.randn(m, d, generator=generator)).to(device)


def _labels(config: ObjectiveBench, m: int, num_classes: int, device: torch.device) -> Tensor:
    """Classes of one size, or nearly, in no order."""
    generator = torch.Generator().manual_seed(config.seed)
    return (torch.arange(m) % num_classes)[torch.randperm(m, generator=generator)].to(device)


def _forward_backward(rate: Callable[[Tensor], Tensor], z: Tensor) -> Work:
    leaf = z.clone().requires_grad_()

    def work() -> None:
        rate(leaf).backward()
        leaf.grad = None

    return work


def _single(config: ObjectiveBench, device: torch.device, m: int, d: int) -> list[dict[str, Any]]:
    """One process: R beside both its sides alone, ΔR beside the form in print and more classes."""
    z, epsilon_squared = _features(config, m, d, device), config.epsilon_squared
    rates = {
        "ours": lambda z: coding_rate(z, epsilon_squared),
        "primal": lambda z: rivals.primal(z, epsilon_squared),
        "dual": lambda z: rivals.dual(z, epsilon_squared),
        "textbook": lambda z: rivals.textbook_rate(z, epsilon_squared),
    }
    peer = rivals.lightly_rate(epsilon_squared)
    if peer is not None:
        rates["lightly"] = peer
    works = {name: _forward_backward(rate, z) for name, rate in rates.items()}
    rows = _rows(config, device, works, ["R", m, d, 0])

    labels = {k: _labels(config, m, k, device) for k in config.classes}
    ours = {
        k: _forward_backward(lambda z, y=y: rate_reduction(z, y, epsilon_squared), z)  # type: ignore[misc]
        for k, y in labels.items()
    }
    few, *more = config.classes
    memberships = torch.diag_embed(one_hot(labels[few], few).T.to(z))
    works = {
        "ours": ours[few],
        "textbook": _forward_backward(
            lambda z: rivals.textbook_rate_reduction(z, memberships, epsilon_squared), z
        ),
        "published code": _forward_backward(
            lambda z: rivals.published_rate_reduction(z, labels[few], few, epsilon_squared), z
        ),
    }
    rows += _rows(config, device, works, ["ΔR", m, d, few])
    for k in more:
        rows += _rows(
            config, device, {"ours": ours[few], f"ours, {k} classes": ours[k]}, ["ΔR", m, d, k]
        )[1:]
    return rows


def _sharded(config: ObjectiveBench, mesh: Mesh, m: int, d: int) -> dict[str, Any]:
    """R of sharded features beside as many silent processes.

    Each of these takes the rate of its share of the features as if it were all: its share of the
    products, the whole factorisation, and no word to the others.
    """
    columns = mesh.tp.shard(d)
    z = _features(config, m, d, mesh.device)[:, columns.start : columns.stop].contiguous()
    epsilon_squared = config.epsilon_squared
    works = {
        "sharded": _forward_backward(
            lambda z: coding_rate(z, epsilon_squared, mesh.layout, m, d), z
        ),
        "silent": _forward_backward(
            lambda z: coding_rate(z, epsilon_squared * len(columns) / d, SINGLE, m), z
        ),
    }
    wait = torch.zeros((), device=mesh.device)
    # Processes that stopped by their own clocks would wait for each other.
    times = interleaved(works, config.pairs, math.inf, lambda: mesh.tp.sum(wait).item())
    memory = peak_bytes(works["sharded"], mesh.device)
    return {
        **dict(zip(_SHAPE, ["R", m, d, 0], strict=True)),
        "candidate": f"ours on {mesh.tp.size} processes",
        "beside": f"{mesh.tp.size} silent processes",
        "seconds": _median(times["sharded"]),
        "ratio": Ratio.of(times["sharded"], times["silent"]),
        "peak_bytes": memory,
    }


_SHAPE = ["objective", "samples", "features", "classes"]


def _rows(
    config: ObjectiveBench,
    device: torch.device,
    works: dict[str, Work],
    shape: list[Any],
) -> list[dict[str, Any]]:
    """A row for each candidate, beside "ours", of [objective, samples, features, classes]."""
    times = interleaved(works, config.pairs, config.seconds, _synchroniser(device), repeat=True)
    memory = {name: peak_bytes(work, device) for name, work in works.items()}
    rows = []
    for name in works:
        row = dict(zip(_SHAPE, shape, strict=True)) | {
            "candidate": name,
            "beside": "ours",
            "seconds": _median(times[name]),
            "ratio": Ratio.of(times[name], times["ours"]),
            "peak_bytes": memory[name],
            "memory_ratio": memory[name] / max(1, memory["ours"]),
        }
        if name == "ours":
            row["gflop"] = _gflop(*shape[1:])
        rows.append(row)
    return rows


def _gflop(m: int, d: int, num_classes: int) -> float:
    """The least work of the small sides: symmetric products once, gradients, Cholesky, inverse."""
    n = min(m, d)
    flop = 3.0 * m * d * n + n**3
    if num_classes:
        m_k = m / num_classes
        n_k = min(m_k, d)
        flop += num_classes * n_k**3
        if d <= m:  # otherwise the classes' products are blocks of the one Gram matrix
            flop += 3.0 * m * d * n_k
    return flop / 1e9


def _synchroniser(device: torch.device) -> Work:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def _median(times: list[float]) -> float:
    return float(torch.tensor(times, dtype=torch.float64).median())


def _table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The rows as text, a ratio with its 95 % interval."""
    head = ["", "m × d", "K", "", "beside", "ms", "time ratio", "MiB", "× memory"]
    lines = [head]
    for row in rows:
        lines.append(
            [
                row["objective"],
                f"{row['samples']} × {row['features']}",
                str(row["classes"] or ""),
                row["candidate"],
                row["beside"],
                f"{1e3 * row['seconds']:.3g}",
                str(row["ratio"]),
                f"{row['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in row else "",
                f"{row['memory_ratio']:.3g}" if "memory_ratio" in row else "",
            ]
        )
    text = aligned(lines)
    effort = [
        f"{row['objective']} {row['samples']}×{row['features']}×{row['classes'] or 1}: "
        f"{row['gflop']:.2f} GFLOP at {row['of_matmul_rate']:.0%}"
        for row in rows
        if "gflop" in row
    ]
    if effort:
        text += [
            "",
            f"forward and backward, {about['threads']} thread(s), {about['device']}, "
            f"{about['processor']}, torch {about['torch']}",
            f"of the {about['matmul_gflops']} GFLOP/s of a large product: " + "; ".join(effort),
        ]
    return "\n".join(text)
