"""What a run tells W&B, TensorBoard and metrics.jsonl, read back from the files it left."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from wandb.proto import wandb_internal_pb2

from dense2conv.cli import main
from dense2conv.data import open_source
from dense2conv.parallel import ParallelConfig, open_mesh
from dense2conv.training import metrics
from dense2conv.training.config import Config
from dense2conv.training.loop import train
from dense2conv.training.measures import Fields, Histogram, layer_flops, magnitudes, radii
from dense2conv.training.metrics import METRICS, TensorboardLog, WandbConfig, WandbLog, metric
from dense2conv.training.passwords import refuse_secrets
from dense2conv.training.run_folder import RunFolder
from tests.ranks import on_ranks

SMALL = [
    "data.side=6",
    "model.widths=[36,12]",
    "train.batch=64",
    "train.steps=20",
    "tune.steps=5",
    "extract.samples=500",
    "log.every=5",
    "log.radius_every=10",
    "checkpoint.every=10",
    "parallel.device=cpu",
]
_HEADER, _BLOCK = 7, 32 * 1024


def records(path: Path) -> list[wandb_internal_pb2.Record]:
    """The records of a .wandb file: LevelDB's log format behind a header of their own."""
    data, found, pieces, at = path.read_bytes(), [], b"", _HEADER
    while at + 7 <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + length > len(data):
            break  # a kill cut it off
        pieces += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(wandb_internal_pb2.Record.FromString(pieces))
            pieces = b""
    return found


def offline_runs(folder: str) -> list[list[wandb_internal_pb2.Record]]:
    """The records of each part of a run, once their own process has written the last one."""
    deadline = time.monotonic() + 30
    while True:
        paths = sorted(Path(folder).glob("wandb/offline-run-*/*.wandb"))
        parts = [records(path) for path in paths]
        if all(of_type(part, "exit") for part in parts) or time.monotonic() > deadline:
            return parts
        time.sleep(0.1)


def items(update) -> dict:
    found: dict = {}
    for item in update:
        *keys, last = item.nested_key or [item.key]
        place = found
        for key in keys:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return found


def history(run) -> list[dict]:
    return [items(r.history.item) for r in run if r.WhichOneof("record_type") == "history"]


def of_type(run, kind: str) -> list:
    return [getattr(r, kind) for r in run if r.WhichOneof("record_type") == kind]


@pytest.fixture
def warned():
    """What is warned of."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("dense2conv").addHandler(handler)
    yield messages
    logging.getLogger("dense2conv").removeHandler(handler)


def metrics_of(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "AWS_SECRET_ACCESS_KEY": "c2VjcmV0LW9mLXRoZS1jbG91ZA",
    "MY_TOKEN": "hunter2hunter2",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from start to report, once resumed, with everything on; its folder."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        words = ["wandb.group=g", "wandb.tags=[a,b]", "tensorboard=true", "log.dead_alarm=0"]
        # so much L1 that units die
        assert main(["train", *SMALL, *words, "objective.l1=3", "run.name=a"]) == 0
        words = ["train.steps=30", "objective.l1=0.01", "then=[prune,extract,report]"]
        assert main(["train", "run.name=a", "resume=true", *words]) == 0
    return str(folder / "runs/a")


def test_two_parts_are_one_wandb_run_with_its_group_tags_and_config(whole):
    parts = offline_runs(whole)
    assert len(parts) == 2
    runs = [of_type(part, "run")[0] for part in parts]
    assert len({run.run_id for run in runs}) == 1
    for run, steps in zip(runs, (20, 30), strict=True):
        assert (run.project, run.run_group, list(run.tags)) == ("dense2conv", "g", ["a", "b"])
        config = items(run.config.update)
        assert config["train"]["steps"] == steps
        assert config["planned"] == {
            "bytes_sent_by_a_process_in_a_step": {"stage1": {"tp": 0.0, "dp": 0.0, "pp": 0.0}}
        }
    (axis,) = [m for m in of_type(parts[0], "metric") if m.glob_name == "*"]
    assert axis.step_metric == "train/step"
    assert of_type(parts[0], "exit")[0].exit_code == 0


def test_wandb_and_metrics_jsonl_say_the_same_at_the_same_steps(whole):
    rows = [row for part in offline_runs(whole) for row in history(part)]
    lines = metrics_of(whole)
    assert [line["step"] for line in lines] == list(range(1, 31))
    by_step = {row["train/step"]: row for row in rows if "train/lr" in row}
    assert sorted(by_step) == list(range(1, 31))
    for line in lines:
        told = by_step[line["step"]]
        for key, value in line.items():
            assert told[f"{metric(key).panel}/{key}"] == pytest.approx(value)
    steps = [row["train/step"] for row in rows]
    assert steps == sorted(steps)
    last = lines[19]
    assert last["images_per_second"] == pytest.approx(64 * last["steps_per_second"])
    flops = 2 * 2 * (36 * 36 + 36 * 12)
    assert last["tflops"] == pytest.approx(last["images_per_second"] * flops / 1e12)
    assert 0 <= last["input_share"] <= 1


def test_every_logged_key_is_in_the_glossary_and_every_entry_is_logged(whole, capsys):
    logged = {key for row in metrics_of(whole) for key in row}
    for part in offline_runs(whole):
        keys = {key for row in history(part) for key in row if not key.startswith("_")}
        logged |= {key.partition("/")[2] for key in keys}
        assert all(key.split("/")[0] == metric(key.partition("/")[2]).panel for key in keys)
    names = {next(name for name, m in METRICS.items() if m is metric(key)) for key in logged}
    # They take a pipeline, a longer training, and a λ that is steered.
    assert names == METRICS.keys() - {"utilisation", "kernels", "lambda"}
    assert metric("layer1/kernels") is METRICS["kernels"]
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text and m.meaning in text for name, m in METRICS.items())


def test_pictures_and_histograms_stand_at_their_steps(whole):
    first, second = offline_runs(whole)
    shown = [row["train/step"] for row in history(first) if "weights/fields" in row]
    assert shown == [0, 2, 5, 10, 20]
    picture = next(row["weights/fields"] for row in history(first) if "weights/fields" in row)
    (file,) = Path(whole).glob(f"wandb/offline-run-*/files/{picture['path']}")
    assert Image.open(file).size == (picture["width"], picture["height"])
    steps = [row["train/step"] for row in history(second) if "weights/layer2/magnitudes" in row]
    assert steps == [30]
    row = next(row for row in history(second) if "weights/layer2/magnitudes" in row)
    nonzero = round((1 - row["train/layer2/sparsity"]) * 36 * 12)
    assert sum(row["weights/layer2/magnitudes"]["values"]) == nonzero
    assert sum(row["weights/radii"]["values"]) == round((1 - row["train/dead"]) * 36)
    assert "weights/pruned_fields" in history(second)[-1]


def test_checkpoints_and_the_network_are_named_where_they_lie(whole):
    first, second = (of_type(part, "artifact") for part in offline_runs(whole))
    aliases = [[set(artifact.aliases) for artifact in part] for part in (first, second)]
    assert aliases == [
        [{"latest", "step_00000020"}],
        [
            {"latest", "step_00000030"},
            {"latest", "step_00000030_pruned"},
            {"latest", "extracted"},
        ],
    ]
    for artifact in (*first, *second):
        files = [Path(entry.ref.removeprefix("file://")) for entry in artifact.manifest.contents]
        assert files
        for file in files:
            assert file.is_relative_to(Path(whole).resolve())
            assert file.is_file() or file.parent.name == "step_00000020"
    assert not list(Path(whole, "wandb").rglob("*.safetensors"))


def test_dead_units_raise_one_alarm(whole, capfd):
    alerts = [of_type(part, "alert") for part in offline_runs(whole)]
    assert len(alerts[0]) == 1
    first = next(line for line in metrics_of(whole) if max(line["dead"], line["layer2/dead"]) > 0)
    assert f"dead at step {first['step']}, more than log.dead_alarm=0;" in alerts[0][0].text


def test_wandb_syncs_them_later(whole):
    """As far as that goes without a network: their own command finds both and would send them."""
    done = subprocess.run(
        [Path(sys.executable).parent / "wandb", "sync", "--dry-run"],
        cwd=whole,
        capture_output=True,
        text=True,
        env=os.environ | {"WANDB_MODE": "offline", "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Would sync 2 run(s)" in done.stdout + done.stderr


_ALL = dict.fromkeys(("scalars", "histograms", "images"), 0)


def test_tensorboard_has_the_same_numbers(whole):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(whole, "tensorboard")), size_guidance=_ALL)
    events.Reload()
    told = {event.step: event.value for event in events.Scalars("train/layer2/rate")}
    expected = {line["step"]: line["layer2/rate"] for line in metrics_of(whole)}
    assert told == pytest.approx(expected)
    assert [e.step for e in events.Histograms("weights/magnitudes")] == [10, 20, 30]
    assert [e.step for e in events.Images("weights/fields")][:3] == [0, 2, 5]


def test_rows_that_wandb_had_not_written_when_all_was_killed_are_told_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train.steps=1000000", "checkpoint.every=20", "log.every=1", "tensorboard=true"]
    run = subprocess.Popen(
        [sys.executable, "-m", "dense2conv", "train", *SMALL, *words],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"},  # a service of its own
    )
    log, deadline = Path("runs/run/metrics.jsonl"), time.monotonic() + 90
    while not (log.exists() and '"step": 67,' in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)  # W&B's own process dies with it
    run.wait()
    for killed in Path("runs/run/wandb").glob("offline-run-*/*.wandb"):
        os.truncate(killed, killed.stat().st_size // 2)  # how much is lost is up to the moment
    steps = max(line["step"] for line in metrics_of("runs/run")) // 20 * 20 + 5

    assert main(["train", "run.name=run", "resume=true", f"train.steps={steps}"]) == 0
    paths = sorted(Path("runs/run/wandb").glob("offline-run-*/*.wandb"))
    rows = [row for path in paths for row in history(records(path))]
    lines = metrics_of("runs/run")
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    for line in lines:
        told = [row for row in rows if row["train/step"] == line["step"] and "train/rate" in row]
        for key in line.keys() - {"time"}:
            name = f"{metric(key).panel}/{key}"
            values = {row.get(name) for row in told}
            if metric(key).panel == "speed":  # of steps that were gone twice
                assert line[key] in values, (line["step"], name)
            else:
                assert values == {line[key]}, (line["step"], name)


def test_what_a_listener_closed_on_is_not_told_again(tmp_path):
    folder = RunFolder(tmp_path)
    sink = TensorboardLog(folder, lambda _: Image.new("RGB", (1, 1)))
    sink(0, {"rate": 1.0})
    sink(7, {"rate": 1.0})
    sink.close()
    told = []
    again = TensorboardLog(folder, lambda _: Image.new("RGB", (1, 1)))
    again._add = lambda key, value, step: told.append((key, value, step))
    again.catch_up([{"step": step, "rate": step / 10} for step in range(6, 10)])
    again.close()
    assert told == [("train/rate", 0.8, 8), ("train/rate", 0.9, 9)]
    assert (tmp_path / "tensorboard_told").read_text() == "9\n"


# ---- nothing that goes wrong there stops a run


class Broken:
    """A W&B whose every word fails, from a given one on."""

    id = "x"

    def __init__(self, works: tuple[str, ...]) -> None:
        self.works = works

    def __getattr__(self, name: str):
        def method(*_, **__):
            if name not in self.works:
                raise RuntimeError(f"no {name} today")

        return method


@pytest.mark.parametrize("works", [(), ("define_metric",), ("define_metric", "log"), None])
def test_a_broken_wandb_stops_nothing(works, tmp_path, monkeypatch, warned):
    def init(**_):
        if works is None:
            raise wandb.errors.CommError("no network")
        return Broken(works)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb, "init", init)
    assert main(["train", *SMALL, "log.dead_alarm=0", "objective.l1=3"]) == 0
    assert len(metrics_of("runs/run")) == 20
    failed = [text for text in warned if "W&B could not" in text]
    assert failed
    assert len(failed) == len(set(failed)) < 8, "once for each thing that fails"


def test_an_online_run_without_a_network_is_kept_offline(tmp_path, monkeypatch, warned):
    real, modes = wandb.init, []

    def init(**options):
        modes.append(options["mode"])
        if options["mode"] == "online":
            raise wandb.errors.CommError("no network")
        return real(**options)

    monkeypatch.setattr(wandb, "init", init)
    listener = WandbLog(WandbConfig(mode="online"), RunFolder(tmp_path), "a", {}, _draw)
    listener(3, {"rate": 2.5})
    listener.close()
    assert modes == ["online", "offline"]
    (run,) = offline_runs(str(tmp_path))
    assert history(run)[0]["train/rate"] == 2.5
    assert "W&B could not start: no network" in warned[0]


def _draw(weight: np.ndarray) -> Image.Image:
    return Image.new("RGB", (len(weight), 1))


def test_a_folder_that_tensorboard_cannot_write_stops_nothing(tmp_path, warned):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")
    listener = TensorboardLog(RunFolder(tmp_path), _draw)
    for step in range(3):
        listener(step, {"rate": 1.0})
        listener.alert("!")
    listener.close()
    assert len(warned) == 1
    assert "TensorBoard could not start" in warned[0]


def test_tensorboard_that_fails_on_the_way_stops_nothing(tmp_path, warned):
    pytest.importorskip("tensorboard")
    listener = TensorboardLog(RunFolder(tmp_path), _draw)
    listener._writer.add_scalar = None
    for step in range(3):
        listener(step, {"rate": 1.0})
    listener.close()
    assert len(warned) == 1
    assert "TensorBoard could not log" in warned[0]


def test_tensorboard_that_is_not_there_is_named_with_its_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train", *SMALL, "tensorboard=true"]) == 2
    assert "dense2conv[tensorboard]" in capsys.readouterr().err
    assert not Path("runs").exists()


# ---- no secret is kept


def test_no_secret_of_the_environment_is_kept(whole):
    written = [path for path in Path(whole).rglob("*") if path.is_file()]
    assert {".wandb", ".yaml", ".jsonl", ".html", ".log"} <= {path.suffix for path in written}
    for path in written:
        content = path.read_bytes()
        assert not any(value.encode() in content for value in SECRETS.values()), path


@pytest.mark.parametrize(
    "root",
    [
        "pipe:curl -s https://me:hunter2hunter2@host/{00..09}.tar",
        "pipe:curl -s -H token:hunter2hunter2 https://host/train.tar",
    ],
)
def test_a_password_is_refused_and_not_repeated(root, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOST_TOKEN", "hunter2hunter2")
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SMALL, "data=webdataset", f'data.root="{root}"']) == 2
    out, err = capfd.readouterr()
    assert "data.root holds" in err
    assert "hunter2" not in out + err
    assert not any(tmp_path.iterdir())


def test_a_variable_that_the_shell_fills_in_is_no_secret(monkeypatch):
    monkeypatch.setenv("HOST_TOKEN", "hunter2hunter2")
    monkeypatch.setenv("DATA_KEY_FOLDER", "/usr")
    refuse_secrets(
        {"data": {"root": "pipe:curl https://me:$HOST_TOKEN@host/a.tar"}, "n": [1, "/usr"]}
    )


# ---- what is measured


def test_flops_are_those_that_torch_counts():
    widths, batch = [7, 5, 3], 4
    for network_scope in (False, True):
        x, counter = torch.randn(batch, widths[0]), FlopCounterMode(display=False)
        layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(widths)]
        with counter:
            for layer in layers:
                x = layer(x)
                if not network_scope:
                    x.sum().backward()
                    x = x.detach()
            if network_scope:
                x.sum().backward()
        assert counter.get_total_flops() == batch * layer_flops(widths, network_scope)


def _magnitudes(weight):
    with open_mesh(ParallelConfig(tp=int(os.environ["WORLD_SIZE"]), device="cpu")) as mesh:
        own = mesh.tp.shard(len(weight))
        return magnitudes(weight[own.start : own.stop], mesh.tp)


@pytest.mark.parametrize("size", [1, 2])
def test_magnitudes_are_those_of_the_whole_layer(size):
    weight = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)) ** 5
    weight[0, :3] = torch.tensor([0.0, 1e-20, 1e20])
    nonzero = weight[weight != 0].abs().log10().clamp(-6, 1).numpy()
    for found in on_ranks(size, _magnitudes, weight):
        expected, edges = np.histogram(nonzero, 70, (-6, 1))
        assert isinstance(found, Histogram)
        np.testing.assert_allclose(found.edges, edges)
        assert np.abs(np.cumsum(found.counts - expected)).max() <= 1  # one may lie on an edge
        assert found.counts.sum() == 7 * 11 - 1


def test_radii_leave_dead_units_out():
    found = radii(torch.tensor([0.5, torch.nan, 2.0]))
    assert found.counts.sum() == 2
    assert found.edges[-1] == 2.0
    assert radii(torch.tensor([torch.nan])).counts.sum() == 0


def _train(folder):
    config = Config()
    config.data.side, config.model.widths = 6, [36, 12]
    config.train.batch, config.train.steps = 64, 6
    config.parallel = ParallelConfig(pp=2, device="cpu")
    with open_mesh(config.parallel) as mesh:
        (Path(folder) / "fields").mkdir(exist_ok=True)
        train(config, mesh, RunFolder(Path(folder)), open_source(config.data, 0), [])


def test_a_pipeline_says_how_busy_its_stages_are(tmp_path):
    on_ranks(2, _train, str(tmp_path))
    for line in metrics_of(str(tmp_path)):
        for stage in (1, 2):
            assert 0 < line[f"stage{stage}/utilisation"] <= 1
        assert {metric(key).unit for key in line}


def test_broken_values_of_the_alarm_are_named(capsys):
    assert main(["train", "log.dead_alarm=1.5"]) == 2
    assert "log.dead_alarm=1.5 is no share" in capsys.readouterr().err


def test_fields_are_drawn_by_whoever_listens(tmp_path):
    seen = []
    listener = WandbLog(
        WandbConfig(), RunFolder(tmp_path), "a", {}, lambda w: seen.append(w) or _draw(w)
    )
    listener(0, {"fields": Fields(np.ones((3, 4), np.float32))})
    listener.close()
    assert seen[0].shape == (3, 4)


def test_rows_that_a_full_disk_did_not_take_are_written_when_there_is_room(tmp_path, monkeypatch):
    room = None  # bytes

    class Disk(metrics.FileIO):
        def write(self, data):
            nonlocal room
            if room == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = super().write(data[:room])
            room = None if room is None else room - written
            return written

    monkeypatch.setattr(metrics, "FileIO", Disk)
    folder = RunFolder(tmp_path)
    with open_mesh(ParallelConfig(device="cpu")) as mesh:
        log = metrics.MetricsLog(mesh, folder, 0, 4, [], 1, 0.0, 1.0)
        for step in range(1, 5):
            room = {2: 10, 3: 0}.get(step)
            log.record(step, {"rate": float(step)})
            log.flush()
        log.close()
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [(row["step"], row["rate"]) for row in rows] == [(n, float(n)) for n in range(1, 5)]
