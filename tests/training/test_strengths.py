"""λ is steered to the share of zeros that was asked for, on any mesh, and through a resume."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dense2conv.cli import main
from dense2conv.models import DenseStack, ModelConfig
from dense2conv.objectives import ObjectiveConfig
from dense2conv.shapes import InputError
from dense2conv.training.optim import OptimizerConfig, make_optimizer
from dense2conv.training.strengths import Strengths
from tests.parallel.test_mesh_parity import _compare

SMALL = [
    "data.side=6",
    "model.widths=[36,17]",
    "train.batch=64",
    "log.radius_every=1000",
    "wandb.mode=disabled",
    "parallel.device=cpu",
]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sparsity": 0.0}, "objective.sparsity=0.0"),
        ({"sparsity": 1.0}, "objective.sparsity=1.0"),
        ({"sparsity": -0.5}, "objective.sparsity=-0.5"),
        ({"sparsity": math.nan}, "objective.sparsity=nan"),
        ({"sparsity": 0.9, "l1": 0.0}, "objective.l1=0"),
    ],
)
def test_what_no_weights_can_be_steered_to_is_named(fields, named):
    with pytest.raises(InputError, match=named):
        ObjectiveConfig(**fields).validate()


def _steered(name="prox_adam", **fields):
    stack = DenseStack(5, ModelConfig(widths=[4, 3], bias=True), dtype=torch.float64).init(0)
    optimizer = make_optimizer(OptimizerConfig(name=name, lr=0.1), stack, 0.3)
    return stack, optimizer, Strengths(ObjectiveConfig(l1=0.3, **fields), stack, optimizer)


def test_lambda_follows_the_share_of_weights_that_are_left():
    _, _, strengths = _steered(sparsity=0.9)
    expected = [0.3, 0.3]
    for progress, zeros in [(0.0, (0.8, 0.95)), (0.5, (0.9, 0.2)), (1.0, (1.0, 0.91))]:
        strengths.steer({i: torch.tensor(z) for i, z in enumerate(zeros)}, progress)
        gain = 0.01 + 0.19 * progress**4
        for i, share in enumerate(zeros):
            ratio = (1 - share) / 0.1
            excess = min(1.0, max(-1.0, math.log(ratio))) if ratio else -1.0
            expected[i] *= math.exp(gain * excess)
    assert [float(strengths[i]) for i in strengths] == pytest.approx(expected, rel=1e-6)
    assert strengths.state() == {"layer1": float(strengths[0]), "layer2": float(strengths[1])}


def test_lambda_that_is_not_steered_stays_a_number():
    _, _, strengths = _steered()
    strengths.steer({0: torch.tensor(0.5), 1: torch.tensor(0.5)}, 0.5)
    assert list(strengths.values()) == [0.3, 0.3]
    assert strengths.state() == {}


@pytest.mark.parametrize("name", ["prox_adam", "AdamW"])
def test_each_layer_steps_with_its_own_lambda_and_the_bits_of_a_number(name):
    by_tensor, stepping, strengths = _steered(name, sparsity=0.5)
    strengths.steer({0: torch.tensor(0.1), 1: torch.tensor(0.9)}, 0.9)
    by_number, other, _ = _steered(name)
    for group, strength in zip(other.param_groups[:2], strengths.values(), strict=True):
        group["l1"] = float(strength)
    for stack, optimizer in ((by_tensor, stepping), (by_number, other)):
        for p in stack.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    for (key, found), expected in zip(
        by_tensor.named_parameters(), by_number.parameters(), strict=True
    ):
        assert torch.equal(found, expected), key


def _rows(name="run"):
    return [
        json.loads(line)
        for line in Path("runs", name, "metrics.jsonl").read_text().split("\n")[:-1]
    ]


@pytest.mark.parametrize("name", ["prox_adam", "SGD"])
def test_both_layers_end_at_the_target(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["objective.sparsity=0.85", "train.steps=400", f"optimizer.name={name}"]
    assert main(["train", *SMALL, *words, "then=[prune,extract]", "tune.steps=5"]) == 0
    last = _rows()[-1]
    assert last["sparsity"] == pytest.approx(0.85, abs=0.02)
    assert last["layer2/sparsity"] == pytest.approx(0.85, abs=0.02)
    assert 0.03 not in (last["lambda"], last["layer2/lambda"])
    layers = json.loads(Path("runs/run/summary.json").read_text())["layers"]
    assert layers[0]["lambda"] == pytest.approx(last["lambda"], rel=0.3)  # a step further
    assert layers[0]["lambda"] != layers[1]["lambda"]


def test_a_resumed_run_steers_on_as_if_nothing_had_been(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["objective.sparsity=0.8", "train.steps=20", "checkpoint.every=10"]
    assert main(["train", *SMALL, *words]) == 0
    end = Path("runs/run/checkpoints/step_00000020")
    whole, rows = end.rename("whole"), _rows()
    assert main(["train", "run.name=run", "resume=true", "wandb.mode=disabled"]) == 0
    (shard,) = end.glob("*.safetensors")
    found, expected = load_file(shard), load_file(whole / shard.name)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    states = [json.loads((path / "state.json").read_text()) for path in (end, whole)]
    assert states[0]["extra"]["lambda"] == states[1]["extra"]["lambda"]
    assert states[0]["extra"]["lambda"].keys() == {"layer1", "layer2"}
    keys = ("lambda", "layer2/lambda", "sparsity", "rate")
    assert [[r[k] for k in keys] for r in rows[-10:]] == [
        [r[k] for k in keys] for r in _rows()[-10:]
    ]


def test_a_run_that_was_not_steered_can_be_from_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SMALL, "train.steps=5"]) == 0
    words = ["objective.sparsity=0.8", "train.steps=8", "wandb.mode=disabled"]
    assert main(["train", "run.name=run", "resume=true", *words]) == 0
    assert _rows()[5]["lambda"] == 0.03
    shutil.rmtree("runs")


@pytest.mark.parametrize(
    "mesh", [(1, 1, 2, 1), (2, 1, 1, 1), pytest.param((1, 2, 1, 1), marks=pytest.mark.slow)]
)
def test_lambda_is_the_same_on_any_mesh(mesh):
    _compare(mesh, 40, "float64", {"objective.sparsity": 0.7}, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_deepspeeds_shards_have_the_lambda_of_their_layer(zero):
    changes = {
        "engine": "deepspeed",
        "deepspeed.zero": zero,
        "optimizer.name": "SGD",
        "objective.sparsity": 0.5,
    }
    _compare((1, 2, 1, 1), 20, "float32", changes, 1e-4)
