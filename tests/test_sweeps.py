"""Sweeps: a folder for each set of values, failures that end nothing else, and a search that searches."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wandb.wandb_agent import Agent

from dense2conv import sweeps
from dense2conv.cli import config_folder, config_keys, main
from dense2conv.sweeps import job_name
from tests.report.run_folders import write_run
from tests.slurm.cluster import wait_until

SMALL = [
    "data.side=6",
    "model.widths=[36,12]",
    "train.batch=64",
    "train.steps=5",
    "log.every=5",
    "wandb.mode=disabled",
    "parallel.device=cpu",
]
SEARCH = ["hydra/sweeper=search", "objective.l1=tag(log,interval(0.0001,1))"]
BEST_L1 = 0.02


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def started(monkeypatch):
    """Runs that take no time, best where λ is BEST_L1; the λ of each that was started."""
    l1s = []

    def train(config, _words):
        l1s.append(config.objective.l1)
        folder = config.run.folder
        folder.mkdir(parents=True)
        objective = -(math.log(config.objective.l1 / BEST_L1) ** 2)
        (folder / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "objective": objective}) + "\n"
        )
        (folder / "summary.json").write_text(json.dumps({"conv_r2": -objective}))

    monkeypatch.setattr(sweeps, "_train", train)
    return l1s


def sweep(*words: str) -> int:
    return main(["train", "--multirun", *words])


def jobs(name: str) -> dict[str, dict]:
    return {job["name"]: job for job in json.loads(Path("runs", name, "sweep.json").read_text())}


def test_a_sweep_keeps_what_it_has_and_goes_on_behind_a_failure(capfd):
    words = ["-m", *SMALL, "run.name=s", "objective.l1=-1,0.03", "parallel.tp=2"]
    assert main(["train", *words]) == 1
    done = "objective.l1=0.03"
    assert jobs("s")["objective.l1=-1"]["state"] == "failed: objective.l1=-1.0; use 0 or more"
    assert jobs("s")[done]["state"] == "done"
    rows = Path("runs/s", done, "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert jobs("s")[done]["value"] == json.loads(rows[-1])["objective"]
    out = capfd.readouterr().out.splitlines()
    assert out[-1] == "runs/s/sweep.json"
    assert any(line.split()[::2] == [done, f"runs/s/{done}"] for line in out), out
    assert sorted(p.name for p in Path("runs/s").glob("[!.]*")) == [
        "multirun.yaml",
        done,
        "sweep.json",
    ]

    before = Path("runs/s", done, "config.yaml").stat().st_mtime_ns
    assert (
        sweep(*SMALL, "run.name=s", "objective.l1=0.03", "parallel.tp=2") == 2
    )  # nothing is swept
    assert sweep(*SMALL, "run.name=s", "objective.l1=0.03,-2", "parallel.tp=2") == 1
    assert jobs("s").keys() == {done, "objective.l1=-2"}
    assert Path("runs/s", done, "config.yaml").stat().st_mtime_ns == before, "it was started again"


@pytest.mark.slow
def test_a_sweep_that_is_asked_to_stop_carries_on(tmp_path):
    words = [*SMALL, "run.name=t", "train.steps=100000", "seed=1,2"]
    start = [sys.executable, "-m", "dense2conv", "train", "--multirun", *words]
    running = subprocess.Popen(start, stderr=subprocess.DEVNULL)
    rows = Path("runs/t/seed=1/metrics.jsonl")
    wait_until(lambda: rows.exists() and rows.stat().st_size > 0, "the first run has begun")
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 85
    assert {name: job["state"] for name, job in jobs("t").items()} == {"seed=1": "stopped"}
    saved = json.loads(rows.read_text().splitlines()[-1])["step"]
    assert sweep(*words, f"train.steps={saved + 1}", "seed=1,1") == 0
    assert json.loads(rows.read_text().splitlines()[-1])["step"] == saved + 1


def test_a_search_goes_where_it_is_better_and_again_past_what_is_done(started):
    def search(name: str, trials: int, direction: str) -> list[float]:
        """The λ that were started."""
        started.clear()
        words = [f"hydra.sweeper.{key}" for key in (f"n_trials={trials}", f"direction={direction}")]
        assert (
            sweep(*SEARCH, *words, "hydra.sweeper.sampler.n_startup_trials=5", f"run.name={name}")
            == 0
        )
        return list(started)

    best, worst = search("best", 12, "maximize"), search("worst", 12, "minimize")
    assert best[:5] == worst[:5], "nothing is known yet"
    near, far = (sum(abs(math.log(l1 / BEST_L1)) for l1 in l1s[5:]) for l1s in (best, worst))
    assert near < 0.8 * far, "it was 0.3 to 0.67 with eight seeds"
    assert sweep("run.name=grid", "objective.l1=0.001,0.01,0.1") == 0
    assert max(job["value"] for job in jobs("best").values()) > max(
        job["value"] for job in jobs("grid").values()
    )

    more = search("best", 14, "maximize")
    assert len(more) == 2, "the others are done"
    assert not set(more) & set(best)
    assert len(jobs("best")) == 14


def test_a_search_goes_on_behind_failures_and_by_another_figure(started, monkeypatch):
    train = sweeps._train

    def fails_twice(config, words):
        if len(started) in (1, 3):
            started.append(None)
            raise RuntimeError("no memory")
        train(config, words)

    monkeypatch.setattr(sweeps, "_train", fails_twice)
    words = ["sweep.metric=conv_r2", "hydra.sweeper.direction=minimize"]
    assert sweep(*SEARCH, *words, "run.name=f", "hydra.sweeper.n_trials=6") == 1
    states = [job["state"] for job in jobs("f").values()]
    assert states.count("done") == 4
    assert states.count("failed: no memory") == 2
    assert len(started) == 6


def test_a_figure_that_is_not_there_is_named(started):
    assert sweep("run.name=m", "sweep.metric=conv_r3", "objective.l1=0.1,0.2") == 1
    for job in jobs("m").values():
        assert "no figure sweep.metric=conv_r3; use one of step, objective, conv_r2" in job["state"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["seed=1"], "nothing to sweep"),
        (["run.name=a,b"], "take one value"),
        (["run.name=../a", "seed=1,2"], "no folder name"),
        (["seeds=1,2"], "did you mean 'seed'"),
        (["experiment=demo,dmo"], "dmo"),
        (["seed=1,["], "mismatched"),
        (["seed=interval(0,9)"], "hydra/sweeper=search does"),
        (["hydra/launcher=submitit_none", "seed=1,2"], "'dense2conv[slurm]'"),
        (["hydra/sweeper=optuna_none", "seed=1,2"], "'dense2conv[sweep]'"),
        (["hydra.sweeper.nonsense=3", "seed=1,2"], "'hydra.sweeper.nonsense' is unknown"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_sentence(words, named, capfd):
    assert sweep(*words) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert named in last
    assert last.startswith("dense2conv: ")


def test_the_folder_of_a_run_is_no_sweeps(capfd):
    Path("runs/run").mkdir(parents=True)
    Path("runs/run/config.yaml").touch()
    assert sweep("seed=1,2") == 2
    assert "give the sweep another run.name" in capfd.readouterr().err


def test_ranks_do_not_sweep(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sweep("seed=1,2") == 2
    assert "without torchrun" in capfd.readouterr().err
    assert not any(Path.cwd().iterdir())


def test_only_training_sweeps(capfd):
    assert main(["prune", "--multirun", "prune.sparsity=0.9,0.95"]) == 2
    assert "goes with train" in capfd.readouterr().err


def test_a_name_tells_its_values_and_is_a_folders():
    assert job_name(["seed=1", "objective.l1=0.01"]) == "objective.l1=0.01,seed=1"
    odd = [["data.root=/a/b"], ["data.root=/ab"], ["model.widths=[3,4]"], ["model.widths=[3,4,5]"]]
    odd += [[f"objective.l1=0.{'1' * n}"] for n in (200, 201)]
    odd += [["=/"], ["=:"]]
    names = [job_name(each) for each in odd]
    assert len(set(names)) == len(names)
    for name in names:
        config = sweeps.Config()
        config.run.name = name
        config.run.validate()
        assert len(name) < 128


def test_wandbs_agent_runs_what_its_sweep_file_says(monkeypatch):
    """The agent's own code makes the words. Their schema is in a package that wants others than we have."""
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "sweep")
    monkeypatch.setenv("WANDB_DIR", str(Path.cwd()))  # the agent sets it, and leaves it
    program = Path("program")
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >words\n')
    program.chmod(0o755)
    config = yaml.safe_load((config_folder() / "wandb_sweep.yaml").read_text())
    assert set(config["parameters"]) <= {key for key, _, _ in config_keys()}
    agent = Agent(api=None, queue=None, sweep_id="sweep")
    agent._sweep_command = config["command"]
    picked = dict.fromkeys(config["parameters"], 1) | dict(word.split("=") for word in SMALL)
    args = {key: {"value": value} for key, value in picked.items()}
    agent._command_run({"run_id": "first", "program": "./program", "args": args})
    assert agent._run_processes["first"].wait() == 0

    monkeypatch.delenv("WANDB_SWEEP_PARAM_PATH")
    assert main(Path("words").read_text().splitlines()) == 0
    saved = yaml.safe_load(Path("runs/sweep-first/config.yaml").read_text())
    assert (saved["seed"], saved["optimizer"]["lr"], saved["then"]) == (1, 1.0, [])
    assert len(Path("runs/sweep-first/metrics.jsonl").read_text().splitlines()) == 5


def test_two_runs_of_a_sweep_are_held_beside_each_other(capfd):
    folders = [write_run(Path(f"runs/s/seed={seed}"), name=f"seed={seed}") for seed in (1, 2)]
    assert main(["report", *map(str, folders)]) == 0
    assert capfd.readouterr().out.strip() == "runs/s/seed=1/compare_seed=2.html"
