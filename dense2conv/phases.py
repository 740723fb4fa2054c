"""What a command does to a run, phase after phase; every process of the mesh goes through it alike."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from omegaconf import OmegaConf

from dense2conv.data import ImageSource, open_source
from dense2conv.files import write_atomically
from dense2conv.parallel import Mesh, open_mesh
from dense2conv.parallel.launch import adopt_slurm
from dense2conv.planner import Estimate, PlanConfig, is_out_of_memory, shortage
from dense2conv.report import table, write_report
from dense2conv.report.images import montage
from dense2conv.report.pictures import run_pictures
from dense2conv.shapes import InputError
from dense2conv.training.checkpoint import latest
from dense2conv.training.config import PHASES, Config
from dense2conv.training.extract import extract
from dense2conv.training.loop import train
from dense2conv.training.metrics import Sink, TensorboardLog, WandbLog
from dense2conv.training.prune import prune
from dense2conv.training.run_folder import RunFolder
from dense2conv.training.signals import Stopped

_STARTED = time.monotonic()


def run(config: Config, command: str = "train") -> dict[str, Any]:
    """One command and, after training, what ``then`` names, as the command line does it.

    Every process that torchrun or Slurm has started calls this; a script that nobody has started so is
    one process.

    Args:
        config: of the run; with ``resume`` the whole of it, not what changes.
        command: train | prune | extract | report.

    Returns:
        What ``summary.json`` holds then, on every process.

    Raises:
        InputError: a value cannot be, or something that it names is missing.
        Stopped: a signal ended the run, which is saved.
        Fault, ToldElsewhere: with processes beside this one, any of them spoilt the run; one says why.
    """
    if command not in ("train", *PHASES):
        raise InputError(f"command {command!r} is unknown; use train, {', '.join(PHASES)}")
    adopt_slurm()
    folder = RunFolder(config.run.folder)
    there = folder.config.is_file()  # all look before any may make the folder
    resume = config.resume or (config.run.existing == "resume" and there)
    config = dataclasses.replace(config, resume=resume)
    config.validate()
    with open_mesh(config.parallel) as mesh:
        run_phases(command, config, mesh)
        summary = json.loads(folder.summary.read_text()) if mesh.is_main else None
        return dict(mesh.broadcast_object(summary))


def run_phases(command: str, config: Config, mesh: Mesh) -> None:
    """One command and, after training, what ``then`` names; every process calls this."""
    folder = RunFolder(config.run.folder)
    if command != "train":
        folder.require("run", folder.config, "train")
    mesh.position.enter("opening the images", limited=False)
    source = open_source(config.data, config.seed, progress=mesh.is_main)
    if (
        command != "report"
    ):  # which only reads; and only now: unusable images leave no folder behind
        _open_run_folder(command, config, mesh, folder)
    wandb: WandbLog | None = None
    sinks: list[Sink] = []
    if mesh.is_main:
        draw = partial(montage, shape=config.data.shape)
        wandb = WandbLog(config.wandb, folder, config.run.name, _told(config), draw)
        sinks = [wandb, *([TensorboardLog(folder, draw)] if config.tensorboard else [])]
    phases = [command, *(config.then if command == "train" else [])]
    try:
        for phase in phases:
            with _memory(phase, config, mesh):
                _run_phase(phase, config, mesh, folder, source, sinks)
            if wandb is not None:
                _refer(wandb, folder)
        if wandb is not None:
            judged = phases[-1] in ("extract", "report")
            _conclude(folder, wandb, config.train.steps, judged)
    except Stopped:
        if wandb is not None:
            _refer(wandb, folder)
        raise
    finally:
        for sink in sinks:
            sink.close()
        folder.release()


@contextmanager
def _memory(phase: str, config: Config, mesh: Mesh) -> Iterator[None]:
    """Where memory runs out, say what takes it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        mesh.position.found = "no memory left"
        raise InputError(shortage(error, config, mesh.pp.rank, phase)) from error


def _run_phase(
    phase: str,
    config: Config,
    mesh: Mesh,
    folder: RunFolder,
    source: ImageSource,
    sinks: list[Sink],
) -> None:
    figures: dict[str, Any] = {}
    mesh.position.enter(phase, limited=False)
    if phase == "train":
        train(config, mesh, folder, source, sinks)
        figures["wall_seconds_train"] = round(time.monotonic() - _STARTED, 2)
    elif phase == "prune":
        prune(config, mesh, folder)
    elif phase == "extract":
        figures = extract(config, mesh, folder, source)
    if mesh.is_main:
        parallel = config.parallel
        mesh_sizes = {"pp": parallel.pp, "dp": parallel.dp, "tp": parallel.tp}
        figures |= {"name": config.run.name, "seed": config.seed, "mesh": mesh_sizes}
        if phase == "report":
            write_report(folder.path)
        # The report itself is part of what it tells the time of, to within its own writing.
        figures["wall_seconds"] = round(time.monotonic() - _STARTED, 2)
        folder.update_summary(figures)


def _told(config: Config) -> dict[str, Any]:
    """What W&B is told of a run: its configuration, and what each process should send in a step."""
    told = dataclasses.asdict(config)
    if config.engine == "native":
        stages = Estimate(PlanConfig(**vars(config)), config.parallel).stages
        sent = {f"stage{i}": stage.sent_bytes for i, stage in enumerate(stages, start=1)}
        told["planned"] = {"bytes_sent_by_a_process_in_a_step": sent}
    return told


def _refer(wandb: WandbLog, folder: RunFolder) -> None:
    """Name the newest checkpoint and the extracted network to W&B, where they lie."""
    checkpoint = latest(folder.checkpoints)
    if checkpoint is not None:
        wandb.artifact("checkpoint", checkpoint)
    wandb.artifact("network", folder.extracted)


def _conclude(folder: RunFolder, wandb: WandbLog, step: int, judged: bool) -> None:
    """The table and where to look, and the same to W&B."""
    summary = json.loads(folder.summary.read_text())
    wandb.summary(summary)
    wandb.images(step, run_pictures(folder.path))
    if judged and "layers" in summary:
        print(table(summary))
    report = folder.path / "report.html"
    print(report if judged and report.exists() else folder.path)


def _open_run_folder(command: str, config: Config, mesh: Mesh, folder: RunFolder) -> None:
    """Rank 0 makes or takes the folder; if it may not, every process ends with the same sentence."""
    problem = None
    if mesh.is_main:
        try:
            if command == "train":
                folder.create(config.run, config.resume)
                write_atomically(folder.config, OmegaConf.to_yaml(OmegaConf.structured(config)))
            else:
                folder.hold()
        except InputError as error:
            problem = str(error)
    problem = mesh.broadcast_object(problem)
    if problem is not None:
        raise InputError(problem)
