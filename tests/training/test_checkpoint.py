"""A run that is resumed is the run that was never interrupted, whatever became of its files."""

import errno
import importlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dense2conv.cli import main
from dense2conv.data import open_source
from dense2conv.models import DenseStack, ModelConfig
from dense2conv.parallel import ParallelConfig, open_mesh
from dense2conv.parallel.mesh import make_mesh
from dense2conv.shapes import InputError
from dense2conv.training import checkpoint, loop
from dense2conv.training.checkpoint import CheckpointConfig, Checkpoints
from dense2conv.training.config import Config
from dense2conv.training.metrics import metric
from dense2conv.training.optim import OptimizerConfig, make_optimizer
from dense2conv.training.run_folder import RunFolder
from tests.ranks import _CONTEXT, _run, meeting_place, on_ranks

SMALL = [
    "data.side=6",
    "model.widths=[36,17]",
    "train.batch=64",
    "train.dtype=float64",
    "checkpoint.every=10",
    "checkpoint.keep=9",
    "log.every=5",
    "wandb.mode=disabled",
    "parallel.device=cpu",
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(name: str, *words: str) -> int:
    return main(["train", *SMALL, f"run.name={name}", *words])


def small_config(steps: int, every: int, keep: int = 9) -> Config:
    """What loop.train needs, as SMALL, with a third layer whose shards differ in length on four ranks."""
    config = Config()
    config.data.side, config.model.widths = 6, [36, 17, 7]
    config.train.batch, config.train.steps, config.train.dtype = 64, steps, "float64"
    config.checkpoint.every, config.checkpoint.keep = every, keep
    config.parallel.device = "cpu"
    return config


def train_in(path: Path, config: Config, mesh, resume: bool = False) -> None:
    """A run, or the rest of it, on a mesh that is open."""
    folder = RunFolder(path)
    folder.fields.mkdir(parents=True, exist_ok=True)
    config.resume = resume
    loop.train(config, mesh, folder, open_source(config.data, config.seed), [])


def alone(path: Path, config: Config, resume: bool = False) -> None:
    """The same on one process."""
    with open_mesh(config.parallel) as mesh:
        train_in(path, config, mesh, resume)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every whole tensor of a checkpoint, joined from its shards."""
    parts: dict[str, list[tuple[list[int], torch.Tensor]]] = {}
    for file_path in sorted(path.glob("*.safetensors")):
        with safe_open(file_path, "pt") as file:
            places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for key in file.keys():  # noqa: SIM118
                offsets = places[key]["saved_offsets"]
                parts.setdefault(key, []).append((offsets, file.get_tensor(key)))
    return {
        key: torch.cat([t for _, t in sorted(found, key=lambda part: part[0])])
        if found[0][0]
        else found[0][1]
        for key, found in parts.items()
    }


def assert_equal(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    assert first
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def step(path: str | Path, number: int) -> Path:
    return Path(path) / "checkpoints" / f"step_{number:08d}"


# What is saved comes back.


def test_one_command_starts_a_run_and_takes_it_up_again():
    words = "train.steps=30 run.existing=resume".split()
    assert train("whole", *words) == 0
    shutil.copytree("runs/whole", "runs/parts")
    shutil.rmtree(step("runs/parts", 30))
    assert train("parts", *words) == 0
    assert_equal(step("runs/whole", 30), step("runs/parts", 30))
    before = step("runs/parts", 30).stat().st_mtime_ns
    assert train("parts", *words) == 0  # and once more, when nothing is left to do
    assert step("runs/parts", 30).stat().st_mtime_ns == before
    assert [path.name for path in sorted(Path("runs").iterdir())] == ["parts", "whole"]


@pytest.mark.parametrize("words", ["resume=true", "run.existing=resume", "run.existing=keep_aside"])
def test_a_run_that_is_going_on_is_left_alone(words, capsys):
    assert train("a", "train.steps=10") == 0
    before = {path: path.read_bytes() for path in Path("runs/a").rglob("*") if path.is_file()}
    hold = "import time; from pathlib import Path; from dense2conv.training.run_folder import RunFolder"
    hold += "; folder = RunFolder(Path('runs/a')); folder.hold(); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert train("a", "train.steps=20", words) == 2
        assert f"runs/a is in use by process {other.pid} on " in capsys.readouterr().err
        assert main(["prune", "run.name=a", "wandb.mode=disabled"]) == 2
        after = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
        del after[Path("runs/a/.lock")]
        assert {k: v for k, v in before.items() if k.name != ".lock"} == after
        other.kill()
    assert train("a", "train.steps=20", words) == 0  # a killed process holds nothing


@pytest.mark.parametrize(
    "optimizer", ["prox_adam", "AdamW", "NAdam", "ASGD", "SGD +optimizer.options.momentum=0.9"]
)
def test_resume_equals_uninterrupted_bit_for_bit(optimizer):
    words = f"optimizer.name={optimizer} train.steps=30".split()
    assert train("whole", *words) == 0
    shutil.copytree("runs/whole", "runs/parts")
    for number in (20, 30):
        shutil.rmtree(step("runs/parts", number))
    assert train("parts", *words, "resume=true") == 0
    assert_equal(step("runs/whole", 30), step("runs/parts", 30))
    lines = [
        [json.loads(x) for x in Path(f"runs/{n}/metrics.jsonl").read_text().splitlines()]
        for n in ("whole", "parts")
    ]
    for whole, parts in zip(*lines, strict=True):
        whole, parts = (
            {k: v for k, v in row.items() if metric(k).panel != "speed" and k != "time"}
            for row in (whole, parts)
        )
        assert whole == parts


def _resume_on_meshes_of_four(path: Path) -> None:
    """Some steps on each of four meshes; the last, whose rows dp shares out, once more in two parts.

    In the first one two pairs along dp share rows out, and each pair holds all of them.
    """
    config = small_config(30, every=5)
    config.parallel.tp = 4
    with open_mesh(config.parallel) as mesh:
        chain = (5, (1, 4, 1), 2), (10, (1, 1, 4), 1), (20, (2, 1, 2), 1), (30, (1, 2, 2), 2)
        for steps, sizes, shard in chain:
            config.train.steps = steps
            config.parallel.pp, config.parallel.dp, config.parallel.tp = sizes
            config.parallel.shard = "weights" if shard > 1 else "none"
            mesh = make_mesh(*sizes, mesh.device, shard_size=shard)
            train_in(path / "moved", config, mesh, resume=steps > 5)
        if mesh.is_main:
            shutil.copytree(path / "moved", path / "again")
            shutil.rmtree(step(path / "again", 30))
        mesh.broadcast_object(None)
        train_in(path / "again", config, mesh, resume=True)


def test_resume_on_other_meshes(tmp_path, monkeypatch):
    # The schedule is a function of the share of the run that is done; here runs differ in length.
    monkeypatch.setattr(loop, "learning_rate", lambda *_: 0.01)
    on_ranks(4, _constant_rate, _resume_on_meshes_of_four, tmp_path)
    assert_equal(step(tmp_path / "moved", 30), step(tmp_path / "again", 30))
    alone(tmp_path / "one", small_config(40, every=40))
    alone(tmp_path / "moved", small_config(40, every=40), resume=True)
    one, moved = tensors(step(tmp_path / "one", 40)), tensors(step(tmp_path / "moved", 40))
    assert one.keys() == moved.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, moved[key], rtol=1e-9, atol=1e-12, msg=key)


def _constant_rate(function, *arguments):
    loop.learning_rate = lambda *_: 0.01
    function(*arguments)


def test_masks_stay_through_further_training():
    assert train("run", "train.steps=10") == 0
    assert main(["prune", "run.name=run", "prune.sparsity=0.9", "wandb.mode=disabled"]) == 0
    pruned = tensors(Path("runs/run/checkpoints/step_00000010_pruned"))
    assert train("run", "train.steps=20", "resume=true") == 0
    after = tensors(step("runs/run", 20))
    for layer in ("layer1", "layer2"):
        mask = pruned[f"layers.{layer}.mask"]
        assert torch.equal(after[f"layers.{layer}.mask"], mask)
        weight = after[f"layers.{layer}.weight"]
        assert not weight[~mask].any()
        assert weight[mask].any()
        assert not torch.equal(weight, pruned[f"layers.{layer}.weight"])


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruning_removes_the_share_that_was_asked_for(scope):
    assert train("run", "train.steps=3", "objective.l1=0") == 0
    words = ["prune.sparsity=0.7", f"prune.scope={scope}", "wandb.mode=disabled"]
    assert main(["prune", "run.name=run", *words]) == 0
    pruned = tensors(Path("runs/run/checkpoints/step_00000003_pruned"))
    weights = [pruned[f"layers.{layer}.weight"] for layer in ("layer1", "layer2")]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros == pytest.approx(0.7, abs=2e-3)
    assert zeros >= 0.7


def test_another_optimizer_is_named(capsys):
    assert train("run", "train.steps=10") == 0
    assert train("run", "train.steps=20", "resume=true", "optimizer.name=AdamW") == 2
    assert "ProxAdam, this run asks for AdamW" in capsys.readouterr().err


def test_an_optimizer_whose_state_has_no_rows_is_named(capsys):
    assert train("run", "train.steps=10", "optimizer.name=Adafactor") == 2
    assert "Adafactor: its col_var has 1 rows for 36 units" in capsys.readouterr().err


# How saving goes on beside training.


class Alone:
    """A small network on one process, with the checkpoints of a run."""

    def __init__(self, mesh, **options):
        self.stack = DenseStack(9, ModelConfig(widths=[7, 3])).init(0)
        self.optimizer = make_optimizer(OptimizerConfig(), self.stack, 0.1)
        config = CheckpointConfig(**options)
        self.checkpoints = Checkpoints(config, Path("checkpoints"), mesh, {}, 10)
        self.mesh = mesh

    def save(self, number, **options):
        for p in self.stack.parameters():
            p.grad = torch.ones_like(p)
        self.optimizer.step()
        self.checkpoints.save(number, self.stack, self.optimizer, **options)

    @property
    def names(self):
        self.checkpoints.wait()
        return sorted(path.name for path in Path("checkpoints").iterdir())


@pytest.fixture
def mesh():
    with open_mesh(ParallelConfig(device="cpu")) as mesh:
        yield mesh


def test_training_goes_on_while_files_are_written(mesh, monkeypatch):
    gate, writing = threading.Event(), []
    save_file = checkpoint.save_file

    def slow(*arguments):
        writing.append(len(writing))
        assert gate.wait(20)
        save_file(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    run = Alone(mesh)
    run.save(1)
    saved = {k: v.clone() for k, v in run.stack.state_dict().items()}
    second = threading.Thread(target=run.save, args=(2,))  # trains, then waits for its turn
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert writing == [0]
    assert not torch.equal(saved["layers.layer1.weight"], run.stack.layer(0).weight)
    assert checkpoint.latest(Path("checkpoints")) is None
    gate.set()
    second.join()
    assert run.names == ["step_00000001", "step_00000002"]
    path = Path("checkpoints/step_00000001")
    assert checkpoint.load(path, mesh, run.stack, run.optimizer, {}) == 1
    for key, value in run.stack.state_dict().items():
        assert torch.equal(value, saved[key]), key


def test_only_the_newest_are_kept():
    assert train("run", "train.steps=50", "checkpoint.keep=2") == 0
    kept = sorted(p.name for p in Path("runs/run/checkpoints").iterdir())
    assert kept == ["step_00000040", "step_00000050"]


@pytest.mark.parametrize(
    ("best", "kept"), [("objective", [2, 6, 7]), ("rate", [4, 6, 7]), ("none", [6, 7])]
)
def test_the_best_is_kept_beside_the_newest(mesh, best, kept):
    run = Alone(mesh, keep=2, best=best)
    objective = [float("nan"), 5.0, 1.0, 2.0, 5.0 - 1e-9, -1.0, 0.0]
    rate = torch.tensor([1.0, 2.0, 3.0, 9.0, 4.0, float("nan"), 1.0])
    for number, values in enumerate(zip(objective, rate, strict=True), 1):
        run.save(number, metrics=dict(zip(("objective", "rate"), values, strict=True)))
    assert run.names == [f"step_{number:08d}" for number in kept]
    run.save(7, pruned=True)  # has no metric, and does not count as the best
    expected = sorted({*kept[:-2], 7})
    assert run.names == [*(f"step_{n:08d}" for n in expected), "step_00000007_pruned"]


def test_the_run_names_the_metric_it_keeps_by(capsys):
    assert train("run", "train.steps=20", "checkpoint.best=objective") == 0
    state = json.loads((step("runs/run", 20) / "state.json").read_text())
    row = json.loads(Path("runs/run/metrics.jsonl").read_text().splitlines()[-1])
    assert state["metrics"] == {"objective": row["objective"], "rate": row["rate"]}
    assert train("other", "checkpoint.best=loss") == 2
    assert "checkpoint.best='loss' is unknown; use objective, rate or none" in (
        capsys.readouterr().err
    )


def test_others_may_read_what_they_may_read_elsewhere(mesh):
    before = os.umask(0o022)
    try:
        run = Alone(mesh)
        run.save(1)
        run.checkpoints.wait()
    finally:
        os.umask(before)
    for path in Path("checkpoints/step_00000001").iterdir():
        assert path.stat().st_mode & 0o777 == 0o644, path


# Damage.


def _flip(path: Path, share: float) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(share * len(content)), len(content) - 1)] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit in the header": lambda shard, state: _flip(shard, 0.01),
    "a flipped bit in the weights": lambda shard, state: _flip(shard, 0.5),
    "a flipped bit in the last byte": lambda shard, state: _flip(shard, 1),
    "a file cut short": lambda shard, state: os.truncate(shard, shard.stat().st_size - 1),
    "an empty file": lambda shard, state: os.truncate(shard, 0),
    "a file missing": lambda shard, state: shard.unlink(),
    "a file too many": lambda shard, state: shutil.copy(shard, shard.with_stem("rank_00007")),
    "state: no JSON": lambda shard, state: state.write_text("{"),
    "state: no object": lambda shard, state: state.write_text("[]"),
    "state: not text": lambda shard, state: state.write_bytes(b"\xff"),
    "state: another step": lambda shard, state: state.write_text(
        state.read_text().replace('"step": 20', '"step": 21')
    ),
    "state: an older kind": lambda shard, state: state.write_text('{"step": 20, "model": {}}'),
}


def test_damage_is_named_and_the_checkpoint_before_it_is_used(tmp_path, capfd, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(checkpoint.log, "warning", lambda text, *a: warnings.append(text % a))
    config = small_config(20, every=10)
    alone(tmp_path / "whole", config)
    for name, damage in DAMAGE.items():
        run = tmp_path / name
        shutil.copytree(tmp_path / "whole", run)
        newest = step(run, 20)
        damage(newest / "rank_00000.safetensors", newest / "state.json")
        with open_mesh(config.parallel) as mesh:
            stack = loop.build_stack(config, mesh, 36)
            with pytest.raises(InputError, match=r"step_00000020.*delete .*step_00000020"):
                checkpoint.load(newest, mesh, stack, None, loop.identity(config))
        warnings.clear()
        alone(run, config, resume=True)
        (warning,) = warnings
        assert "step_00000020" in warning
        assert f"step_00000020.damaged, carrying on from {step(run, 10)}" in warning
        assert ("state.json" if name.startswith("state") else "rank_0000") in warning, name
        assert_equal(step(run, 20), step(tmp_path / "whole", 20))
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert names == ["step_00000010", "step_00000020", "step_00000020.damaged"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(capsys):
    assert train("run", "train.steps=20") == 0
    for number in (10, 20):
        _flip(step("runs/run", number) / "rank_00000.safetensors", 0.5)
    for _ in range(2):  # nor does it when it is requeued
        assert train("run", "train.steps=20", "resume=true") == 2
        assert "every checkpoint is damaged; delete runs/run/checkpoints" in (
            capsys.readouterr().err
        )


def test_half_written_checkpoints_are_passed_over_and_swept_away():
    assert train("run", "train.steps=20") == 0
    folder = Path("runs/run/checkpoints")
    for name in ("step_00000030.partial", "step_00000099.partial"):  # of a larger mesh
        (folder / name).mkdir()
        (folder / name / "rank_00007.safetensors").touch()
    (folder / "step_00000098").mkdir()  # no state.json: never finished
    assert checkpoint.latest(folder) == folder / "step_00000020"
    assert train("run", "train.steps=30", "resume=true") == 0
    assert not list(folder.glob("*.partial"))
    assert train("run", "train.steps=40", "resume=true") == 0
    assert not list(folder.glob("*.damaged"))


class _Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_no_file_is_unpickled(mesh):
    run = Alone(mesh)
    run.save(1)
    path = Path("checkpoints") / run.names[0]
    for name in (".metadata", "model.pt", "metadata.pkl"):
        (path / name).write_bytes(pickle.dumps(_Bomb()))
    assert checkpoint.load(path, mesh, run.stack, run.optimizer, {}) == 1
    # A shard that is a pickle, by somebody who gave it the right checksum.
    shard = path / "rank_00000.safetensors"
    shard.write_bytes(pickle.dumps(_Bomb()))
    state = json.loads((path / "state.json").read_text())
    del state["sha256"]
    state["files"] = {shard.name: checkpoint._checksum(shard)}
    state["sha256"] = checkpoint._checksum_of_state(state)
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="not safetensors"):
        checkpoint.load(path, mesh, run.stack, run.optimizer, {})
    assert not Path("exploded").exists()


def test_no_file_of_a_run_is_a_pickle():
    words = ["then=[prune,extract,report]", "tune.steps=2", "extract.samples=99"]
    assert train("run", "train.steps=10", *words) == 0
    known = {".safetensors", ".json", ".jsonl", ".yaml", ".npz", ".html"}
    unknown = {p for p in Path("runs/run").rglob("*") if p.is_file() and p.suffix not in known}
    assert unknown == {Path("runs/run/.lock")}
    assert Path("runs/run/.lock").read_text().startswith("process ")


# A full disk.


@pytest.fixture(params=["tmpfs", "writer"])
def disk(request, tmp_path, monkeypatch):
    """Two functions that fill the disk under the checkpoints of ``run``, and make room again."""
    folder = RunFolder(tmp_path / "run").checkpoints
    folder.mkdir(parents=True)
    if request.param == "writer":
        save_file, full = checkpoint.save_file, threading.Event()

        def write(copies, path, *arguments):
            if full.is_set():
                path.write_bytes(b"half of it")
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            save_file(copies, path, *arguments)

        monkeypatch.setattr(checkpoint, "save_file", write)
        yield full.set, full.clear
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is root's")
    filler = folder / "filler"

    def fill():
        filler.write_bytes(bytes(shutil.disk_usage(folder).free - 100_000))

    yield fill, filler.unlink
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_the_run_goes_on(disk, tmp_path, monkeypatch):
    fill, make_room = disk
    warnings: list[str] = []
    monkeypatch.setattr(checkpoint.log, "warning", lambda text, *a: warnings.append(text % a))
    save = Checkpoints.save

    def save_and_change_the_disk(self, number, *arguments, **options):
        if number == 2:
            fill()
        if number == 3:
            self._thread.join()
            names = sorted(path.name for path in self.folder.glob("step_*"))
            assert names == ["step_00000001"]
            make_room()
        save(self, number, *arguments, **options)

    monkeypatch.setattr(Checkpoints, "save", save_and_change_the_disk)
    config = small_config(4, every=1)
    config.model.widths = [300]  # 10,800 weights and as much momentum in fp64: 170 kB
    alone(tmp_path / "run", config)
    (warning,) = warnings
    for named in ("step_00000002", "No space left", "MiB are free", "step_00000001;"):
        assert named in warning
    saved = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert sorted(saved) == ["step_00000001", "step_00000003", "step_00000004"]


def test_a_disk_full_at_the_end_ends_the_run_and_leaves_nothing_half_written(disk, tmp_path):
    fill, make_room = disk
    config = small_config(2, every=1)
    config.model.widths = [300]
    alone(tmp_path / "run", config)
    config.train.steps = 3
    fill()
    with pytest.raises(
        InputError,
        match=r"step_00000003.*No space left.*MiB are free.*step_00000002; put that right",
    ):
        alone(tmp_path / "run", config, resume=True)
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names - {"filler"} == {"step_00000001", "step_00000002"}
    make_room()
    alone(tmp_path / "run", config, resume=True)
    assert (step(tmp_path / "run", 3) / "state.json").is_file()


def _one_disk_of_two_is_full(path: Path) -> str:
    config = small_config(2, every=1)
    config.parallel.tp = 2

    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if os.environ["RANK"] == "1":
        checkpoint.save_file = write
    with open_mesh(config.parallel) as mesh, pytest.raises(InputError) as caught:
        train_in(path, config, mesh)
    return str(caught.value)


def test_every_rank_hears_that_one_could_not_write(tmp_path):
    first, second = on_ranks(2, _one_disk_of_two_is_full, tmp_path)
    assert first == second
    assert "step_00000002.partial/rank_00001.safetensors could not be written" in first
    assert "the last good checkpoint is none yet" in first
    assert not list((tmp_path / "checkpoints").iterdir())


def _one_of_two_hangs(path: Path) -> None:
    config = small_config(2, every=1)
    config.parallel.tp, config.parallel.timeout_s = 2, 2
    ended = path / "ended"

    def write_until_the_other_ends(*_):
        while not ended.exists():
            time.sleep(0.05)

    if os.environ["RANK"] == "1":
        checkpoint.save_file = write_until_the_other_ends
    with open_mesh(config.parallel) as mesh:
        with pytest.raises(RuntimeError, match=r"longer than parallel\.timeout_s"):
            train_in(path, config, mesh)
        ended.touch()


def test_a_rank_that_writes_for_ever_ends_the_run_in_time(tmp_path):
    on_ranks(2, _one_of_two_hangs, tmp_path)


# Killed processes.


def _killed_at(path: Path, point: int) -> None:
    """Four steps, killed before the ``point``-th thing that the background does to the disk."""
    count = 0

    def killing(function, half=lambda *_: None):
        def call(*arguments, **options):
            nonlocal count
            if threading.current_thread() is not threading.main_thread():
                count += 1
                if count == point:
                    half(*arguments)
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "chmod"):
        setattr(os, name, killing(getattr(os, name)))
    checkpoint.save_file = killing(
        checkpoint.save_file, half=lambda _, file, *__: file.write_bytes(b"half")
    )
    alone(path, small_config(4, every=2, keep=1), resume=True)


def _kill_at_every_point(path: Path, codes) -> None:
    """A copy of ``whole`` for each point; forks, since imports would take most of the time."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    importlib.import_module("torch._dynamo")  # torch does so with the first optimizer
    for point in range(1, 40):
        run = path / str(point)
        shutil.copytree(path / "whole", run)
        shutil.rmtree(step(run, 4))
        child = os.fork()
        if child == 0:
            _killed_at(run, point)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        codes.put(code)
        if code != -signal.SIGKILL:
            break


def test_killed_before_any_change_to_the_disk_the_last_good_checkpoint_is_there(tmp_path):
    config = small_config(4, every=2)
    alone(tmp_path / "whole", config)
    codes = _CONTEXT.Queue()
    process = _CONTEXT.Process(target=_kill_at_every_point, args=(tmp_path, codes))
    process.start()
    points = 0
    while (code := codes.get(timeout=20)) == -signal.SIGKILL:
        points += 1
        run = tmp_path / str(points)
        newest = checkpoint.latest(run / "checkpoints")
        assert newest in (step(run, 2), step(run, 4))
        assert_equal(newest, tmp_path / "whole" / "checkpoints" / newest.name)
        alone(run, config, resume=True)
        assert_equal(step(run, 4), step(tmp_path / "whole", 4))
        assert not list((run / "checkpoints").glob("*.partial"))
    assert code == 0
    assert points >= 9, "too few places were tried"
    process.join()


def _two_ranks(path: Path, resume: bool) -> None:
    config = small_config(24, every=2, keep=2)
    config.data.side, config.model.widths = 16, [512]  # shards of 1 MB, some milliseconds to write
    config.parallel.tp = 2
    with open_mesh(config.parallel) as mesh:
        train_in(path, config, mesh, resume)


def test_two_ranks_killed_at_any_time_resume_to_the_same_weights(tmp_path):
    on_ranks(2, _two_ranks, tmp_path / "whole", False)
    run, chance = tmp_path / "run", random.Random(0)
    halves = 0
    for attempt in range(4):
        store = meeting_place()
        arguments = (2, store.port, _CONTEXT.Queue(), _two_ranks, (run, attempt > 0))
        ranks = [_CONTEXT.Process(target=_run, args=(r, *arguments)) for r in range(2)]
        for process in ranks:
            process.start()
        began = {p.name for p in (run / "checkpoints").glob("step_*")}
        deadline = time.monotonic() + 20
        while not {p.name for p in (run / "checkpoints").glob("*.partial")} - began:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        for process in chance.sample(ranks, 2):  # one first, either of them
            process.kill()
        for process in ranks:
            process.join()
            assert process.exitcode == -signal.SIGKILL
        halves += bool(list((run / "checkpoints").glob("*.partial")))
    assert halves, "no kill met a save"
    on_ranks(2, _two_ranks, run, True)
    assert_equal(step(run, 24), step(tmp_path / "whole", 24))
    steps = [json.loads(x)["step"] for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 25))
    assert not list((run / "checkpoints").glob("*.partial"))
