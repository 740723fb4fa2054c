"""``train --multirun``: Hydra's sweepers and launchers over runs, each in a folder of its own.

A sweep lives in ``ROOT/NAME``, with a run's folder for each job that is named after the values that were
swept: the same values are the same run, however often and in whatever order the sweep is started.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dense2conv.configuration import compose, config_folder, config_keys, explain, load_config
from dense2conv.files import write_atomically
from dense2conv.parallel import open_mesh
from dense2conv.parallel.launch import adopt_slurm, inside_job, run_local_ranks
from dense2conv.phases import run_phases
from dense2conv.shapes import InputError
from dense2conv.training.config import Config
from dense2conv.training.run_folder import RunFolder
from dense2conv.training.signals import EX_REQUEUE

FLAGS = ("-m", "--multirun")
_HYDRA = [  # run folders and what is printed are ours
    "hydra.output_subdir=null",
    "hydra.sweep.subdir=.",
    "hydra/hydra_logging=none",
    "hydra/job_logging=none",
]
_OURS = ("run.name", "run.root")
_EXTRAS = {"hydra/sweeper/optuna": "sweep", "hydra/launcher/submitit": "slurm"}
log = logging.getLogger(__name__)


class JobFailed(Exception):
    """A run of a sweep ended with an error, which it has told."""


@dataclass
class Job:
    """What is known of one run of a sweep; kept beside its folder, where no other job writes."""

    name: str
    number: int
    overrides: list[str]
    folder: str
    start: int  # of the sweep: its first, its second, …
    state: str = "running"  # running | stopped | done | failed: why
    value: float | None = None


@dataclass(frozen=True)
class Sweep:
    """What all jobs of a sweep share.

    Args:
        folder: of the sweep.
        fixed: keys of overrides that are not swept.
        start: how often the sweep has been started, this time included.
    """

    folder: Path
    fixed: frozenset[str]
    start: int

    def record(self, name: str) -> Path:
        """The file that says how a job went."""
        return self.folder / ".jobs" / f"{name}.json"

    def write(self, job: Job) -> None:
        """Say how a job goes."""
        self.record(job.name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.record(job.name), json.dumps(asdict(job)) + "\n")

    def is_done(self, job: Job) -> bool:
        """Whether an earlier start ended this very job."""
        record = self.record(job.name)
        before = Job(**json.loads(record.read_text())) if record.is_file() else None
        return before is not None and (before.state, before.overrides) == ("done", job.overrides)

    def jobs(self) -> list[Job]:
        """This start's, and what earlier ones have ended."""
        jobs = [job for job in known(self.folder) if job.state == "done" or job.start == self.start]
        return sorted(jobs, key=lambda job: (job.start, job.number))


def known(folder: Path) -> list[Job]:
    """All jobs that a sweep has had."""
    return [Job(**json.loads(path.read_text())) for path in folder.glob(".jobs/*.json")]


def sweep(words: list[str]) -> int:
    """Start a job for each combination of values, or for those that a searching sweeper asks for.

    Jobs that fail do not end the others. What came of them is printed, and left in ``sweep.json``.

    Returns:
        The exit code: 0, 1 if a job failed, or that of a job that was asked to stop.

    Raises:
        InputError: the sweep as a whole cannot be.
    """
    if inside_job():
        raise InputError(
            "--multirun starts the processes of each run itself; start it without torchrun and srun, "
            "or with hydra/launcher=submitit_slurm"
        )
    try:
        parsed = OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        raise InputError(explain(error)) from error
    fixed = [each for each in parsed if not each.is_sweep_override()]
    ours = [
        each.input_line or "" for each in fixed if not _key(each.input_line).startswith("hydra")
    ]
    swept = {each.key_or_group for each in parsed} - {each.key_or_group for each in fixed}
    if swept & {"run.name", "run.root"}:
        raise InputError("run.name and run.root say where the sweep lies; they take one value")
    config = OmegaConf.to_object(compose(ours))
    assert isinstance(config, Config)
    config.run.validate()
    folder = Path(config.run.root) / config.run.name
    if RunFolder(folder).config.exists():
        raise InputError(f"{folder} is the folder of a run; give the sweep another run.name")
    logging.getLogger("alembic").setLevel(logging.WARNING)  # of Optuna; tells all that it loads
    start = 1 + max((job.start for job in known(folder)), default=0)
    this = Sweep(folder, frozenset(_key(word) for word in ours), start)
    code = _run(this, [*_HYDRA, f'hydra.sweep.dir="{folder}"', *words])
    jobs = this.jobs()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "sweep.json", json.dumps([asdict(job) for job in jobs], indent=2))
    print(_table(jobs, config.sweep.metric))
    print(folder / "sweep.json")
    failed = any(job.state != "done" for job in jobs)
    return code or int(failed)


def _run(this: Sweep, words: list[str]) -> int:
    try:
        with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        hydra.multirun("config", partial(run_job, this), words)  # jobs compose for themselves
    except (HydraException, OmegaConfBaseException) as error:
        remedy = "; hydra/sweeper=search does" if "not support sweep type" in str(error) else ""
        for choice, extra in _EXTRAS.items():
            if f"Could not find '{choice}" in str(error):
                remedy = f"; pip install -c constraints.txt 'dense2conv[{extra}]'"
        raise InputError(explain(error, [k for k, _, _ in config_keys()]) + remedy) from error
    except InputError:
        raise
    except SystemExit as stop:  # a job was asked to stop, so the sweep is
        log.warning("dense2conv: stopped; the same command carries on")
        return int(stop.code or 0)
    except JobFailed:  # all others have been started, and the table says why
        return 1
    except Exception as error:  # a sweeper without a single value, a launcher that lost a job
        log.error("dense2conv: the sweep ended early: %s: %s", type(error).__name__, error)
        return 1
    return 0


def run_job(this: Sweep, _: DictConfig) -> float:
    """Hydra's task function: one run, as ``train`` would do it, whether here or in a job of submitit.

    Returns:
        The figure ``sweep.metric``.

    Raises:
        JobFailed: the run did; Hydra goes on with the others.
        SystemExit: the run was asked to stop, and saved; Hydra ends.
    """
    adopt_slurm()  # submitit's tasks, where it has several for a job, are the ranks
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(message)s")
    hydra = HydraConfig.get()
    overrides = [word for word in hydra.overrides.task if _key(word) not in _OURS]
    swept = [word for word in overrides if _key(word) not in this.fixed]
    if not swept:
        raise InputError(
            "--multirun has nothing to sweep; give a key several values, as in seed=1,2"
        )
    name = job_name(swept)
    job = Job(name, hydra.job.num, overrides, str(this.folder / name), this.start)
    given = [_key(word) for word in overrides]
    keep = "run.existing" not in given
    words = [*overrides, f'run.name="{name}"', f'run.root="{this.folder}"']
    words += ["run.existing=resume"] if keep else []
    words += [f"wandb.group={this.folder.name}"] if "wandb.group" not in given else []
    done = keep and this.is_done(job)
    if not done and first:
        this.write(job)
    try:
        config = load_config("train", words)
        if not done:
            _train(config, words)
        if not first:
            return math.nan  # the first rank speaks for all
        job.value = _figure(RunFolder(config.run.folder), config.sweep.metric)
        job.state = "done"
        return job.value
    except SystemExit:
        job.state = "stopped"
        raise
    except Exception as error:
        known = isinstance(error, InputError)
        log.error("dense2conv: %s", error, exc_info=None if known else error)
        job.state = f"failed: {str(error).partition(chr(10))[0] or type(error).__name__}"
        raise JobFailed(str(error)) from None
    finally:
        if first:
            this.write(job)


def _train(config: Config, words: list[str]) -> None:
    if inside_job():
        with open_mesh(config.parallel) as mesh:
            run_phases("train", config, mesh)
        return
    # Even a single process is one of its own: what ends it, such as the lack of memory, ends no other job.
    code = run_local_ranks(config.parallel.world_size, ["train", *words])
    if code in (EX_REQUEUE, 130):
        raise SystemExit(code)
    if code:
        raise InputError(f"it ended with exit code {code}, for the reason above")


def job_name(overrides: list[str]) -> str:
    """A folder's name for these values, another one for any others."""
    whole = ",".join(sorted(overrides))
    name = re.sub(r"[^\w.+=,@-]+", "", whole).lstrip(".+=,@-")
    if name == whole and 0 < len(name) <= 100:
        return name
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return f"{name[:100]}-{digest}" if name else digest


def _key(word: str | None) -> str:
    return (word or "").split("=", 1)[0].lstrip("+~")


def _figure(folder: RunFolder, key: str) -> float:
    """A figure of summary.json, or else of the last line of metrics.jsonl."""
    rows = folder.metrics.read_text().splitlines()
    figures = json.loads(rows[-1]) | json.loads(folder.summary.read_text())
    numbers = {k: v for k, v in figures.items() if isinstance(v, int | float)}
    if key not in numbers:
        raise InputError(
            f"{folder.path} has no figure sweep.metric={key}; use one of {', '.join(numbers)}"
        )
    return float(numbers[key])


def _table(jobs: list[Job], metric: str) -> str:
    rows = [("run", metric, "folder, or what is wrong")]
    for job in jobs:
        state, _, why = job.state.partition(": ")
        value = state if job.value is None else f"{job.value:.6g}"
        rows.append((job.name, value, why or job.folder))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows)
