"""Who runs out of memory is told what takes it, and which key to change."""

import re

import pytest
import torch

from dense2conv.cli import main
from dense2conv.planner import Estimate
from dense2conv.planner.shortage import is_out_of_memory, shortage, tensors
from dense2conv.training import loop
from dense2conv.training.config import Config
from tests.planner.plans import plan_config

SMALL = ["train.steps=2", "data.side=6", "wandb.mode=disabled", "parallel.device=cpu"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_weight_that_no_host_can_hold_is_named(capsys):
    assert main(["train", *SMALL, "model.widths=[36,1000000000000]"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(r"out of memory \(.*can't allocate memory: you tried to allocate \d+", line)
    assert "weights of layer2 [1000000000000, 36], 137,329,101.6 MiB" in line
    assert "raise parallel.tp or parallel.pp" in line
    assert "dense2conv plan" in line


def test_a_device_without_memory_is_named(capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 …")

    monkeypatch.setattr(loop, "next_batch", full)
    words = ["train.batch=3000", "model.widths=[4000]", "data.kind=noise"]
    assert main(["train", *SMALL, *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB);" in line
    assert "Gram matrix, rate of layer1 [3000, 3000], 68.7 MiB" in line
    assert "lower train.batch" in line


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("…"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_no_memory(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel.tp": 2, "parallel.dp": 2, "optimizer.name": "AdamW"},
        {"train.dtype": "float64", "parallel.pp": 2},
    ],
)
def test_tensors_add_up_to_what_the_plan_has(changes):
    config = plan_config({"model.widths": [300, 200], "train.batch": 64} | changes)
    run = Config(**{key: vars(config)[key] for key in vars(Config())})
    for i, stage in enumerate(Estimate(config, config.parallel).stages):
        found: dict[str, int] = {}
        for held in tensors(run, i):
            kind = held.name.split(" ")[0]
            found[kind] = found.get(kind, 0) + held.num_bytes
        assert found["weights"] == stage.memory.weights
        assert found["momenta"] == stage.memory.optimizer
        assert found["gradient"] == stage.memory.gradients


def test_extraction_is_told_of_its_sample():
    config = Config()
    config.extract.samples = 10**7
    text = shortage(MemoryError(), config, 0, "extract")
    assert "sample of images [10000000, 256], 9,765.6 MiB" in text
    assert "lower extract.samples" in text
