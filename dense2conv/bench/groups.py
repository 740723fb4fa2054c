"""Candidates of ``dense2conv bench step`` that take turns on all processes, and the tables they give."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dense2conv.bench.timing import Ratio, Work, aligned, interleaved, peak_bytes
from dense2conv.parallel import Mesh

LEARNING_RATE = 1e-6  # the update is made and timed, and moves next to nothing


@dataclass(frozen=True)
class Candidate:
    """One way to do the work; ``kept`` is what it holds on this process between two times.

    Without ``work`` it cannot be had here, and ``note`` says why.
    """

    work: Work | None
    kept: Iterable[Tensor] = ()
    note: str = ""


@dataclass(frozen=True)
class Group:
    """Candidates that took turns, a row each, ours first; and the marks that ours is held to."""

    what: str
    rows: list[dict[str, Any]]
    marks: list[dict[str, Any]]

    def __str__(self) -> str:
        lines = [[self.what, "ms", "time / ours", "MiB a process", ""]]
        for row in self.rows:
            figures = ["", "", ""]
            if "seconds" in row:
                milliseconds, mebibytes = 1e3 * row["seconds"], row["peak_bytes"] / 2**20
                figures = [f"{milliseconds:.4g}", str(row["ratio"]), f"{mebibytes:.1f}"]
            lines.append([f"  {row['candidate']}", *figures, row["note"]])
        text = aligned(lines)
        for mark in self.marks:
            met = "met" if mark["met"] else "MISSED"
            text.append(f"  {mark['mark']}: {mark['is']}; {mark['bound']}: {met}")
        return "\n".join(text)


def measure(
    mesh: Mesh, candidates: dict[str, Candidate], pairs: int, seconds: float
) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """Seconds of every candidate in each of ``pairs`` rounds, fewer if those would take longer than
    ``seconds``; and a row each.
    """
    synchronise = synchroniser(mesh)
    works = {name: each.work for name, each in candidates.items() if each.work is not None}
    began = time.perf_counter()
    for work in works.values():
        work()
    # Agreed by all: a process that stopped by its own clock would leave the others waiting.
    round_seconds = max(everywhere(mesh, time.perf_counter() - began))
    num_rounds = min(pairs, max(3, int(seconds / round_seconds)))
    times = interleaved(works, num_rounds, math.inf, synchronise)
    rows = []
    for name, candidate in candidates.items():
        row: dict[str, Any] = {"candidate": name, "note": candidate.note}
        if name in works:
            synchronise()
            peak = sum(t.nbytes for t in candidate.kept) + peak_bytes(works[name], mesh.device)
            row["seconds"] = median(times[name])
            row["ratio"] = Ratio.of(times[name], times["ours"])
            row["peak_bytes"] = int(max(everywhere(mesh, peak)))
        rows.append(row)
    return times, rows


def everywhere(mesh: Mesh, number: float) -> list[float]:
    """Every process's number."""
    own = torch.tensor([number], dtype=torch.float64, device=mesh.device)
    return [float(each) for each in mesh.tp.gather(own, mesh.tp.size)]


def synchroniser(mesh: Mesh) -> Work:
    """Wait for the device and for the other processes."""
    return lambda: mesh.tp.sum(torch.zeros((), device=mesh.device)).item()


def on_one(mesh: Mesh, make: Callable[[], Candidate]) -> Candidate:
    """A candidate of the first process; the others wait."""
    return make() if mesh.is_main else Candidate(lambda: None)


def mark(name: str, value: Ratio | float, bound: str, met: bool) -> dict[str, Any]:
    return {"mark": name, "is": value, "bound": bound, "met": met}


def arrows(widths: list[int]) -> str:
    return "→".join(map(str, widths))
