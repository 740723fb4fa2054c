"""A run on a GPU is the run on a processor: ``launch/test -m gpu``."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dense2conv.cli import main
from tests.training.test_checkpoint import tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SMALL = [
    "data.side=8",
    "model.widths=[64,33]",
    "train.batch=128",
    "train.steps=20",
    "wandb.mode=disabled",
]
EXACT = "train.dtype=float64"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _train(name, device, *words):
    assert main(["train", *SMALL, f"run.name={name}", f"parallel.device={device}", *words]) == 0
    return tensors(sorted(Path(f"runs/{name}/checkpoints").glob("step_*"))[-1])


def _assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        error = (found[key].double() - value.double()).norm() / value.double().norm().clamp(min=1)
        assert error <= tolerance, key


@pytest.mark.parametrize(
    "words",
    [
        "",
        "train.batch=48",  # the dual side: fewer samples than units
        "objective.scope=network model.nonlinearity=tanh parallel.microbatches=4",
        "objective.on=post model.nonlinearity=tanh",
        "objective.noise_correction=true",
        "optimizer.name=AdamW optimizer.lr=0.002 optimizer.clip=1.0",
    ],
)
def test_the_same_weights_in_float64(words):
    expected = _train("cpu", "cpu", EXACT, *words.split())
    _assert_close(_train("cuda", "cuda", EXACT, *words.split()), expected, 1e-9)


@pytest.mark.parametrize("words", ["train.compute=bfloat16", "train.compile=true"])
def test_nearly_the_same_weights_by_other_products(words):
    expected = _train("cpu", "cpu")
    _assert_close(_train("cuda", "cuda", words), expected, 5e-2)


def test_a_checkpoint_moves_between_devices():
    words = [EXACT, "checkpoint.every=10"]
    expected = _train("cpu", "cpu", *words)
    _train("moved", "cuda", *words)
    shutil.rmtree("runs/moved/checkpoints/step_00000020")
    _assert_close(_train("moved", "cpu", *words, "resume=true"), expected, 1e-9)


def test_what_is_pruned_and_extracted_is_the_same():
    words = [EXACT, "train.steps=200", "then=[prune,extract,report]", "tune.steps=20"]
    _assert_close(_train("cuda", "cuda", *words), _train("cpu", "cpu", *words), 1e-6)
    cuda, cpu = (
        json.loads(Path(f"runs/{name}/summary.json").read_text())["layers"]
        for name in ("cuda", "cpu")
    )
    for found, expected in zip(cuda, cpu, strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, (int, float)) and "seconds" not in key:
                assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
