"""The command line as people use it: what it says when it works, and when it cannot."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dense2conv.cli import COMMANDS, config_folder, config_keys, load_config, main
from dense2conv.shapes import InputError
from dense2conv.structure import load

SMALL = [
    "data.side=6",
    "model.widths=[36,12]",
    "train.batch=64",
    "train.steps=20",
    "tune.steps=5",
    "extract.samples=500",
    "log.every=5",
    "wandb.mode=disabled",
    "parallel.device=cpu",
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> int:
    return main([*words])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train", "train.stepz=3"], "'train.stepz' is unknown; did you mean 'train.steps'"),
        (["train", "trian.steps=3"], "'trian.steps' is unknown; did you mean 'train.steps'"),
        (["train", "train.steps=many"], "many"),
        (["train", "model.widths=[3,x]"], "x"),
        (["train", "train.dtype=int8"], "train.dtype='int8'"),
        (["train", "experiment=dmo"], "dmo"),
        (["train", "data=folder"], "set data.root"),
        (["train", "data=folder", "data.root=nowhere"], "nowhere is not a folder"),
        (["train", "model.widths=[]"], "model.widths=[]"),
        (["train", "model.nonlinearity=gelu"], "'gelu'"),
        (["train", "parallel.pp=3"], "parallel.pp=3 is more than the 2 layers"),
        (["train", "parallel.dp=3"], "train.batch=1024 does not divide"),
        (["train", "objective.epsilon_squared=1", "objective.noise_variance=1"], "null"),
        (["train", "engine=fairscale", "parallel.pp=2"], "parallel.pp=1"),
        (["train", "optimizer.name=Adamm"], "'Adamm'"),
        (["train", "engine=horovod"], "'horovod'"),
        (["train", "run.name=../escape"], "no folder name"),
        (["train", "then=[report,dance]"], "dance"),
        (["train", "resume=true"], "holds no run"),
        (["train", "wandb.mode=loud"], "'loud'"),
        (["train", "prune.sparsity=1.5"], "prune.sparsity=1.5"),
        (["train", "data.side"], "data.side"),
        (["train", "checkpoint.every=0"], "checkpoint.every=0"),
        (["train", "tune.steps=-1"], "tune.steps=-1"),
        (["train", "extract.window=4"], "extract.window=4"),
        (["extract", "run.name=absent"], "dense2conv train run.name=absent"),
        (["report", "run.name=absent"], "dense2conv train run.name=absent"),
        (["trane"], "did you mean 'train'"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(words, named, capsys):
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert named in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err + out
    assert not any(Path.cwd().iterdir())


def test_a_mesh_that_does_not_fit_the_job_is_said_once(capsys, monkeypatch):
    for rank, words in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert run("train", *SMALL, "parallel.tp=2") == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == words


def test_help_names_every_command_group_and_key(capsys):
    assert run("--help") == 0
    overview = capsys.readouterr().out
    assert all(command in overview for command in COMMANDS)
    assert run("train", "--help") == 0
    text = capsys.readouterr().out
    for key, _, line in config_keys():
        assert line, f"{key} has no help"
        assert any(row.strip().startswith(f"{key}=") and line in row for row in text.splitlines())
    assert "experiment" in text
    assert "demo" in text
    assert "--multirun" in text
    assert "hydra/sweeper" in text


@pytest.mark.parametrize(
    "experiment", sorted(p.stem for p in (config_folder() / "experiment").glob("*.yaml"))
)
def test_every_experiment_composes(experiment):
    config = load_config("train", [f"experiment={experiment}", "data.root=x"])
    assert config.run.name == experiment
    head = (config_folder() / "experiment" / f"{experiment}.yaml").read_text()
    assert "dense2conv train" in head, "an experiment opens with its command"


def test_a_run_from_start_to_report_and_each_phase_by_itself(capsys):
    assert run("train", *SMALL, "run.name=a", "then=[prune,extract,report]") == 0
    assert "runs/a/report.html" in capsys.readouterr().out
    folder = Path("runs/a")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert {"objective", "rate", "power", "l1", "sparsity", "layer2/rate"} <= lines[-1].keys()
    summary = json.loads((folder / "summary.json").read_text())
    wanted = """zero_fraction median_radius random_radius distinct_centre_fraction num_kernels
        left_over_fraction conv_r2 conv_r2_tuned conv_r2_interior heldout_objective_dense
        heldout_objective_conv num_weights_dense num_weights_conv wall_seconds mesh layers
        whitening_gain median_participation""".split()
    assert set(wanted) <= summary.keys()
    assert len(summary["layers"]) == 2
    assert summary["zero_fraction"] >= 0.95

    for command in ("prune", "extract", "report"):
        assert run(command, "run.name=a", "tune.steps=2", "wandb.mode=disabled") == 0
    stack = load(folder / "extracted")
    assert stack.extra["tuned_steps"] == 2

    before = OmegaConf.load(folder / "config.yaml")
    assert run("train", *SMALL, "run.name=a") == 2
    assert "resume=true" in capsys.readouterr().err
    assert OmegaConf.load(folder / "config.yaml") == before


def test_a_trace_shows_three_steps():
    assert run("train", *SMALL, "train.steps=9", "run.name=traced", "profile=true") == 0
    trace = json.loads(Path("runs/traced/trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    steps = {name for name in names if name.startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#5", "ProfilerStep#6", "ProfilerStep#7"}
    assert any(name == "aten::addmm" or name == "aten::mm" for name in names)


def test_an_older_run_is_kept_aside():
    for _ in range(3):
        assert run("train", *SMALL, "train.steps=1", "run.name=b", "run.existing=keep_aside") == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["b", "b.1", "b.2"]


def test_a_checkpoint_of_another_model_is_named(capsys):
    assert run("train", *SMALL, "run.name=c") == 0
    capsys.readouterr()
    assert run("train", *SMALL, "run.name=c", "resume=true", "model.widths=[36,13]") == 2
    message = capsys.readouterr().err
    assert "[36, 12]" in message
    assert "[36, 13]" in message


def test_resuming_needs_the_name_and_what_changes_alone():
    words = ["then=[prune]", "seed=5", "objective.l1=0.02"]
    assert run("train", *SMALL, *words, "run.name=d") == 0
    assert run("train", "run.name=d", "resume=true", "train.steps=25") == 0
    config = OmegaConf.load("runs/d/config.yaml")
    assert (config.seed, config.objective.l1, config.data.side, config.train.steps) == (
        5,
        0.02,
        6,
        25,
    )
    assert Path("runs/d/checkpoints/step_00000025_pruned").is_dir()


@pytest.mark.parametrize("line", ["nonsense: 3", "seed: many", "[unclosed"])
def test_a_saved_configuration_that_was_spoilt_is_named(line, capsys):
    Path("runs/e").mkdir(parents=True)
    Path("runs/e/config.yaml").write_text(line)
    assert run("report", "run.name=e") == 2
    message = capsys.readouterr().err
    assert "runs/e/config.yaml" in message
    assert len(message.strip().splitlines()) == 1


def test_nothing_of_hydras_lies_about():
    assert run("train", *SMALL, "train.steps=1") == 0
    assert sorted(p.name for p in Path.cwd().iterdir()) == ["runs"]


def _subprocess(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dense2conv", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
    )


def test_the_command_starts_its_own_ranks_and_logs_to_wandb_offline():
    words = [w for w in SMALL if "wandb" not in w]
    done = _subprocess(
        "train", *words, "run.name=two", "parallel.tp=2", "then=[prune,extract,report]"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "runs/two/report.html"
    assert list(Path("runs/two/wandb").glob("offline-run-*/*.wandb"))
    assert "Warning" not in done.stderr
    again = _subprocess("train", *words, "run.name=two", "parallel.tp=2")
    assert again.returncode == 2
    assert len(again.stderr.strip().splitlines()) == 1


def test_output_that_is_not_read_to_its_end_is_no_error():
    words = [sys.executable, "-m", "dense2conv", "--help"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environments = [os.environ | {"PYTHONUNBUFFERED": value} for value in ("", "1")]
    commands = [subprocess.Popen(words, env=each, **pipes) for each in environments]
    for command in commands:
        command.stdout.close()  # as head does
    for command in commands:
        assert command.communicate()[1] == b""
        assert command.returncode == 141


def test_another_broken_pipe_is_an_error(monkeypatch):
    def fails(_words):
        raise BrokenPipeError

    monkeypatch.setattr("dense2conv.cli._main", fails)
    with pytest.raises(BrokenPipeError):
        run("train")


def test_torchrun_starts_the_ranks_as_well():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    words = ["-m", "dense2conv", "train", *SMALL, "run.name=t", "parallel.tp=2", "then=[prune]"]
    done = subprocess.run([*torchrun, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "runs/t"
    assert len(Path("runs/t/metrics.jsonl").read_text().splitlines()) == 20


def test_a_failing_rank_ends_them_all_with_its_message(tmp_path):
    done = _subprocess(
        "train", *SMALL, "run.name=gone", "parallel.tp=2", "data=folder", f"data.root={tmp_path}"
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "holds no images" in done.stderr


def test_ranks_do_not_outlive_a_launcher_that_is_killed():
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "dense2conv",
            "train",
            *SMALL,
            "run.name=k",
            "parallel.tp=2",
            "train.steps=1000000",
        ],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not Path("runs/k/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    assert len(children) == 2
    launcher.kill()
    launcher.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_an_unknown_key_inside_a_saved_run_is_an_input_error():
    with pytest.raises(InputError, match="unknown"):
        load_config("train", ["nonsense.key=1"])
