"""The command line: ``dense2conv train|prune|extract|report|plan|doctor|bench`` with Hydra overrides."""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dense2conv import __version__
from dense2conv.bench.data import DataBench, bench_data
from dense2conv.bench.doctor import Doctor, doctor
from dense2conv.bench.objective import ObjectiveBench, bench_objective
from dense2conv.bench.step import StepBench, bench_step
from dense2conv.completion import SHELLS, completion, key_words
from dense2conv.configuration import closest, compose, config_folder, config_keys, load_config
from dense2conv.parallel import Mesh, open_mesh
from dense2conv.parallel.faults import Fault, ToldElsewhere, say
from dense2conv.parallel.launch import (
    adopt_slurm,
    end_with_launcher,
    inside_job,
    run_local_ranks,
)
from dense2conv.phases import run_phases
from dense2conv.planner import PlanConfig, as_json, make_plan, rehearsal_lines, rehearse
from dense2conv.planner import table as plan_table
from dense2conv.report import write_comparison
from dense2conv.shapes import InputError
from dense2conv.sweeps import FLAGS, sweep
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
    "completion": "print what completes commands, keys and values in a shell: completion bash|zsh|fish",
    "bench": "measure speed and memory beside the best alternative: bench NAME",
}
RUN_COMMANDS = ("train", "prune", "extract", "report")
_MULTIRUN = [
    "       dense2conv train --multirun key=value,value …   a run for each combination",
    "       … --multirun hydra/sweeper=search 'key=interval(from,to)'   a search",
    "       … --multirun hydra/launcher=submitit_slurm   each run a job of Slurm",
]
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
        code = _main(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _unread()
    except InputError as error:
        if first_rank:
            print(f"dense2conv: {error}", file=sys.stderr)
        return 2
    except (Fault, ToldElsewhere) as end:
        if isinstance(end, Fault):
            say(end)
        return 2 if isinstance(end.__cause__, InputError) else 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        at = [f"at {error.filename}"] if error.filename else []
        where = " ".join([error.strerror or "", *at, *getattr(error, "__notes__", [])])
        print(
            f"dense2conv: {where}; make room and carry on with resume=true",
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


def _unread() -> int:
    """Whoever read our output, such as ``head``, has gone: end as other programs do, without a word."""
    output = select.poll()
    output.register(sys.stdout, 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        raise  # it was another pipe
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still unwritten
    return 128 + signal.SIGPIPE


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"dense2conv {__version__}")
        return 0
    command, overrides = words[0], words[1:]
    if command not in COMMANDS:
        raise InputError(f"command {command!r} is unknown{closest(command, COMMANDS)}")
    if command == "bench":
        return _bench(overrides)
    if command == "doctor":
        return _measure(["doctor"], overrides, Doctor, doctor)
    if command == "plan":
        return _plan(overrides)
    if command == "completion":
        return _completion(overrides)
    if any(word in ("-h", "--help") for word in overrides):
        print(_help(command))
        return 0
    if any(word in FLAGS for word in overrides):
        if command != "train":
            raise InputError(f"{command} takes one run at a time; --multirun goes with train")
        return sweep([word for word in overrides if word not in FLAGS])
    if command == "report" and any(map(_is_folder, overrides)):
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
        raise InputError(f"benchmark {name!r} is unknown{closest(str(name), BENCHES)}")
    return _measure(["bench", str(name)], words[1:], *BENCHES[str(name)])


def _measure(
    command: list[str], words: list[str], schema: type, measure: Callable[[Any, Mesh], None]
) -> int:
    """A command that is no run's: its own configuration, and a mesh."""
    if any(word in ("-h", "--help") for word in words):
        print("\n".join(_key_lines(schema())))
        return 0
    config: Any = OmegaConf.to_object(compose(words, schema))
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
    if config.rehearse:
        told = "\n".join(["", *rehearsal_lines(rehearse(config))])
        print(told, file=sys.stderr if config.json else sys.stdout)
    return 0


def _completion(words: list[str]) -> int:
    if len(words) != 1 or words[0] in ("-h", "--help"):
        print(
            f"usage: dense2conv completion {'|'.join(SHELLS)}\n\nIts first line says where it goes."
        )
        return 0 if words else 2
    offered = [("", command) for command in COMMANDS]
    offered += [("completion", shell) for shell in SHELLS]
    offered += [("bench", name) for name in BENCHES]
    offered += [("train", FLAGS[-1])]
    schemas: dict[str, Any] = dict.fromkeys(RUN_COMMANDS, Config)
    schemas |= {"plan": PlanConfig, "doctor": Doctor}
    schemas |= {f"bench {name}": schema for name, (schema, _) in BENCHES.items()}
    for command, schema in schemas.items():
        offered += [(command, word) for word in ["--help", *key_words(schema())]]
    print(completion(words[0], offered, [*RUN_COMMANDS, "plan"]), end="")
    return 0


def _is_folder(word: str) -> bool:
    """Whether a word names a folder, if only to be; those of a sweep's runs look like overrides."""
    return "=" not in word or Path(word).is_dir()


def _compare(folders: list[str]) -> int:
    if len(folders) != 2 or not all(map(_is_folder, folders)):
        raise InputError(
            f"dense2conv report {' '.join(folders)} names no two folders; give two as in "
            "report runs/a runs/b, or one run as in report run.name=a"
        )
    print(write_comparison(Path(folders[0]), Path(folders[1])))
    return 0


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
    for folder in sorted({file.parent for file in config_folder().glob("*/**/*.yaml")}):
        names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        groups.append(f"  {folder.relative_to(config_folder()).as_posix():{width}}  {names}")
    return "\n".join(
        [
            f"dense2conv {command}: {COMMANDS[command]}",
            "",
            f"usage: dense2conv {command} [group=choice …] [key=value …]",
            *(_MULTIRUN if command == "train" else []),
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
