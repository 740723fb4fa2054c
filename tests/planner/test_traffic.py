"""Planned collectives against those of the real code, on a fake process group of 1,024 ranks."""

import pytest

from dense2conv.planner import Estimate
from dense2conv.planner.rehearsal import rehearse
from dense2conv.planner.traffic import Collective
from tests.planner.plans import plan_config
from tests.ranks import on_ranks

IMAGES = {"data.kind": "noise", "data.side": 224, "data.channels": 3, "train.batch": 4096}
WIDE = {**IMAGES, "model.widths": [150_528, 1024, 500]}
SHARDED = {"parallel.shard": "weights", "train.compute": "bfloat16", "model.bias": True}
NARROW = {"objective.scope": "network", "model.widths": [1_500, 201]}
MICRO = {"objective.scope": "network", "parallel.microbatches": 2}
CASES = [  # (pp, dp, tp), and what else differs
    ((1, 1, 1024), {"model.widths": [150_528]}),
    ((1, 1, 8), {}),
    ((1, 128, 8), {}),
    ((1, 1024, 1), {}),
    ((2, 64, 8), {"parallel.microbatches": 2, "model.bias": True}),
    ((1, 128, 8), {"objective.scope": "network", "parallel.microbatches": 4}),
    ((2, 64, 8), MICRO),
    # Layers that narrow: blocks of their weights travel, of uneven shards, too.
    ((1, 128, 8), NARROW | {"train.batch": 65_536}),
    ((2, 64, 8), NARROW | {"train.batch": 262_144, "parallel.microbatches": 2, "model.bias": True}),
    ((1, 128, 8), NARROW | SHARDED | {"train.batch": 65_536}),
    ((1, 128, 8), NARROW | SHARDED | {"train.batch": 65_536, "parallel.shard": "optimizer"}),
    ((1, 128, 8), {"objective.batch_scope": "local", "train.dtype": "float64"}),
    ((1, 128, 8), {"objective.on": "post", "model.standardise": False}),
    ((1, 128, 8), SHARDED),
    ((2, 64, 8), SHARDED | MICRO),
    ((1, 128, 8), SHARDED | {"parallel.dp_shard": 8, "optimizer.clip": 1.0}),
    ((2, 64, 8), SHARDED | MICRO | {"parallel.dp_shard": 4}),
    ((1, 128, 8), {"objective.noise_correction": True, "data.side": 16}),
    ((2, 64, 8), {"optimizer.clip": 1.0}),
    ((1, 128, 8), {"objective.scope": "network", "optimizer.clip": 1.0}),
]


def _config(sizes, changes):
    config = plan_config(WIDE | changes)
    config.parallel.pp, config.parallel.dp, config.parallel.tp = sizes
    return config


def _differences() -> list[list[list[str]]]:
    """Of each case and each of its stages."""
    return [[found.differences for found in rehearse(_config(*case))] for case in CASES]


@pytest.fixture(scope="module")
def differences() -> list[list[list[str]]]:
    return on_ranks(1, _differences)[0]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_plan_of_1024_ranks_is_what_the_code_sends(differences, case):
    (pp, *_), _ = CASES[case]
    assert differences[case] == [[]] * pp


def test_bytes_of_rings():
    assert Collective("", "all_gather", "tp", 800).sent_bytes(8) == 700
    assert Collective("", "all_reduce", "dp", 800, count=2).sent_bytes(8) == 2800
    assert Collective("", "send", "pp", 800, count=3).sent_bytes(2) == 2400


def test_one_process_sends_nothing():
    config = _config((1, 1, 1), {})
    (stage,) = Estimate(config, config.parallel).stages
    assert stage.collectives == []
