"""The command line: ``dense2conv train|prune|extract|report|plan|doctor|bench`` with Hydra overrides."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dense2conv import __version__
from dense2conv.bench.data import DataBench, bench_data
from dense2conv.bench.doctor import Doctor, doctor
from dense2conv.bench.objective import ObjectiveBench, bench_objective
from dense2conv.bench.step import StepBench, bench_step
from dense2conv.parallel import Mesh, open_mesh
from dense2conv.parallel.launch import (
    adopt_slurm,
    end_with_launcher,
    inside_job,
    run_local_ranks,
)
from dense2conv.phases import run_phases
from dense2conv.planner import PlanConfig, as_json, make_plan
from dense2conv.planner import table as plan_table
from dense2conv.report import write_comparison
from dense2conv.shapes import InputError
from dense2conv.training.config import Config
from dense2conv.training.metrics import glossary
from dense2conv.training.run_folder import RunFolder
from dense2conv.training.signals import EX_REQUEUE, Stopped

COMMANDS = {
    "train": "train a dense network; with then=[prune,extract,report] the whole path",
    "prune": "mask the smallest weights of a run's newest checkpoint",
    "extract": "turn a run's pruned network into a convolution, verify and tune it",
    "report": "write a run's report.html, or hold two beside each other: report runs/a runs/b",
    "plan": "memory, traffic and time of a run on a cluster: plan cluster=h200x8 nodes=16",
    "doctor": "versions, devices, the speed of each axis and of the disk: doctor parallel.tp=2",
    "bench": "measure speed and memory beside the best alternative: bench NAME",
}
BENCHES: dict[str, tuple[type, Callable[[Any, Mesh], None]]] = {
    "data": (DataBench, bench_data),
    "objective": (ObjectiveBench, bench_objective),
    "step": (StepBench, bench_step),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 with one sentence on what to change."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    adopt_slurm()
    end_with_launcher()
    first_rank = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first_rank else logging.ERROR, format="%(message)s")
    try:
        return _main(words)
    except InputError as error:
        if first_rank:
            print(f"dense2conv: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" at {error.filename}" if error.filename else ""
        print(
            f"dense2conv: {error.strerror}{where}; make room and carry on with resume=true",
            file=sys.stderr,
        )
        return 2
    except Stopped as stopped:
        if first_rank:
            print(f"dense2conv: {stopped}; carry on with resume=true", file=sys.stderr)
        return EX_REQUEUE
    except KeyboardInterrupt:
        if first_rank:
            print("dense2conv: stopped; carry on with resume=true", file=sys.stderr)
        return 130


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"dense2conv {__version__}")
        return 0
    command, overrides = words[0], words[1:]
    if command not in COMMANDS:
        raise InputError(f"command {command!r} is unknown{_closest(command, COMMANDS)}")
    if command == "bench":
        return _bench(overrides)
    if command == "doctor":
        return _measure(["doctor"], overrides, Doctor, doctor)
    if command == "plan":
        return _plan(overrides)
    if any(word in ("-h", "--help") for word in overrides):
        print(_help(command))
        return 0
    if command == "report" and any("=" not in word for word in overrides):
        return _compare(overrides)
    config = load_config(command, overrides)
    if not inside_job() and config.parallel.world_size > 1:
        if command == "train":  # before processes are started in vain
            RunFolder(config.run.folder).check(config.run, config.resume)
        return run_local_ranks(config.parallel.world_size, words)
    with open_mesh(config.parallel) as mesh:
        run_phases(command, config, mesh)
    return 0


def _bench(words: list[str]) -> int:
    name = words[0] if words and "=" not in words[0] else None
    if name in (None, "-h", "--help"):
        print(f"usage: dense2conv bench NAME [key=value …]\n\nNAME: {', '.join(BENCHES)}")
        return 0
    if name not in BENCHES:
        raise InputError(f"benchmark {name!r} is unknown{_closest(str(name), BENCHES)}")
    return _measure(["bench", str(name)], words[1:], *BENCHES[str(name)])


def _measure(
    command: list[str], words: list[str], schema: type, measure: Callable[[Any, Mesh], None]
) -> int:
    """A command that is no run's: its own configuration, and a mesh."""
    if any(word in ("-h", "--help") for word in words):
        print("\n".join(_key_lines(schema())))
        return 0
    config: Any = OmegaConf.to_object(_compose(words, schema))
    config.validate()
    if not inside_job() and config.parallel.world_size > 1:
        return run_local_ranks(config.parallel.world_size, [*command, *words])
    with open_mesh(config.parallel) as mesh:
        measure(config, mesh)
    return 0


def _plan(words: list[str]) -> int:
    if any(word in ("-h", "--help") for word in words):
        print(_help("plan", PlanConfig()))
        return 0
    config: Any = load_config("plan", words, PlanConfig)
    plan = make_plan(config)
    print(as_json(plan) if config.json else plan_table(plan))
    return 0


def _compare(folders: list[str]) -> int:
    if len(folders) != 2 or any("=" in folder for folder in folders):
        raise InputError(
            f"dense2conv report {' '.join(folders)} names no two folders; give two as in "
            "report runs/a runs/b, or one run as in report run.name=a"
        )
    print(write_comparison(Path(folders[0]), Path(folders[1])))
    return 0


# ---- configuration
# ---------------------------------------------------------------------------------


def load_config(command: str, overrides: list[str], schema: type[Config] = Config) -> Config:
    """Compose and check the configuration of a command.

    A new run, or its plan, starts from the defaults and the groups in ``conf/``. Resumed runs and the
    other commands start from what the run was trained with, and take the overrides on top.

    Raises:
        InputError: unknown or ill-typed keys, or values that contradict each other.
    """
    composed = _compose(overrides, run=schema)
    # All processes look before any of them may make the folder, which takes all to be connected.
    there = RunFolder(Path(composed.run.root) / composed.run.name).config.is_file()
    resume = composed.resume or (composed.run.existing == "resume" and there)
    if resume or command not in ("train", "plan"):
        composed = _saved(composed, overrides, schema)
    config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
    config.resume = resume
    config.validate()
    return config


def _compose(
    overrides: list[str], schema: type | None = None, run: type[Config] = Config
) -> DictConfig:
    """A run's configuration from ``conf/``, or, of a ``schema``, its defaults; overrides on top."""
    store = ConfigStore.instance()
    store.store(name="schema", node=run)
    if schema is not None:
        store.store(name="bench", node=schema)
    try:
        with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
            return compose(config_name="bench" if schema else "config", overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        keys = [key for key, _, _ in config_keys(schema() if schema else run())]
        raise InputError(_explain(error, keys)) from error


def _saved(composed: DictConfig, overrides: list[str], schema: type[Config]) -> DictConfig:
    folder = RunFolder(Path(composed.run.root) / composed.run.name)
    folder.require("run", folder.config, "train")
    try:
        saved = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(folder.config))
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        raise InputError(
            f"{folder.config} is no configuration of a run: {_explain(error)}"
        ) from error
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+")
        if OmegaConf.select(composed, key) is not None or "." in key:
            OmegaConf.update(saved, key, OmegaConf.select(composed, key), merge=False)
    assert isinstance(saved, DictConfig)
    return saved


def config_folder() -> Path:
    """``conf/``: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def _explain(error: Exception, keys: Sequence[str] = ()) -> str:
    """Hydra's message as one sentence, with the key that was probably meant."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None and str(cause) not in str(error):
        lines += [line.strip() for line in str(cause).splitlines() if line.strip()]
    lines = [line for line in lines if not re.match(r"(full_key|object_type|reference_type)", line)]
    message = " ".join(lines)
    unknown = re.search(r"[Kk]ey '([\w.]+)'|Could not override '([\w.@]+)'", message)
    if unknown and "not in" in message:
        override = re.search(r"Could not override '([\w.]+)'", message)
        key = override.group(1) if override else unknown.group(1)
        return f"key {key!r} is unknown{_closest(key, keys)}"
    return f"{message} (--help lists every key)"


def _closest(word: str, choices: Any) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; use one of {', '.join(choices)}"


def config_keys(node: Any = None, prefix: str = "") -> list[tuple[str, Any, str]]:
    """(key, default, help) of every key, read off the dataclasses."""
    node = Config() if node is None else node
    keys: list[tuple[str, Any, str]] = []
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            keys += config_keys(value, f"{prefix}{field.name}.")
        else:
            keys.append((f"{prefix}{field.name}", value, field.metadata.get("help", "")))
    return keys


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "dense2conv: dense networks in, convolutions out",
            "",
            "usage: dense2conv COMMAND [key=value …]",
            "",
            *lines,
            "",
            "try:   dense2conv train experiment=demo parallel.tp=2",
            "keys:  dense2conv train --help",
        ]
    )


def _help(command: str, config: Config | None = None) -> str:
    """Every group and every key of a command, one line each."""
    keys = _key_lines(config or Config())
    width = _key_width(config_keys(config))
    groups = []
    for folder in sorted(p for p in config_folder().iterdir() if p.is_dir()):
        names = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        groups.append(f"  {folder.name:{width}}  {names}")
    return "\n".join(
        [
            f"dense2conv {command}: {COMMANDS[command]}",
            "",
            f"usage: dense2conv {command} [group=choice …] [key=value …]",
            "",
            "groups (files in conf/):",
            *groups,
            "",
            "keys, with their defaults:",
            *keys,
            *(
                ["", "metrics, of layers after the first as layer2/… :"]
                if command == "train"
                else []
            ),
            *([f"  {line}" for line in glossary()] if command == "train" else []),
            "",
            "outside torchrun and Slurm the command starts its own local processes",
        ]
    )


def _key_lines(config: Any) -> list[str]:
    """Every key with its default and its help."""
    keys = config_keys(config)
    width = _key_width(keys)
    return [f"  {f'{key}={_plain(value)}':{width}}  {text}" for key, value, text in keys]


def _key_width(keys: list[tuple[str, Any, str]]) -> int:
    return max(len(f"{key}={_plain(value)}") for key, value, _ in keys if len(_plain(value)) < 20)


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).replace(" ", "").replace("'", "")
