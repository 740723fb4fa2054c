"""Same seed, any mesh, same weights: tp, pp, dp and their products against one process."""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from dense2conv.data import open_source
from dense2conv.parallel import open_mesh
from dense2conv.shapes import InputError
from dense2conv.training import loop
from dense2conv.training.checkpoint import Checkpoints
from dense2conv.training.config import Config
from dense2conv.training.metrics import metric
from dense2conv.training.run_folder import RunFolder
from tests.ranks import on_ranks

MESHES = [  # pp, dp, tp, micro-batches
    (1, 1, 2, 1),
    (2, 1, 1, 1),
    (1, 2, 1, 1),
    (2, 1, 2, 1),
    (1, 1, 1, 4),
    (2, 2, 1, 3),
]


def small_config(steps: int, dtype: str, mesh: tuple[int, int, int, int]) -> Config:
    config = Config()
    config.data.side = 6
    config.model.widths = [36, 17, 10]  # shards of unequal length on two ranks
    config.train.batch, config.train.steps, config.train.dtype = 96, steps, dtype
    config.checkpoint.every = 10_000
    pp, dp, tp, microbatches = mesh
    config.parallel.pp, config.parallel.dp, config.parallel.tp = pp, dp, tp
    config.parallel.microbatches = microbatches
    return config


def _trained(mesh_sizes, steps, dtype, changes):
    """The whole weights after training, by layer, and the metrics of the last step."""
    config = small_config(steps, dtype, mesh_sizes)
    for key, value in changes.items():
        *group, name = key.split(".")
        setattr(getattr(config, group[0]) if group else config, name, value)
    config.validate()
    weights: dict[int, torch.Tensor] = {}

    def keep(checkpoints, step, stack, *_, **__):
        for i in stack.indices:
            layer = stack.layer(i)
            weights[i] = stack.rows.gather(layer.weight.detach().clone(), layer.num_units)

    save, Checkpoints.save = Checkpoints.save, keep
    try:
        with open_mesh(config.parallel) as mesh:
            folder = RunFolder(Path(mesh.broadcast_object(tempfile.mkdtemp())))
            folder.fields.mkdir(exist_ok=True)
            loop.train(config, mesh, folder, open_source(config.data, config.seed), [])
            last = json.loads(folder.metrics.read_text().splitlines()[-1]) if mesh.is_main else {}
    finally:
        Checkpoints.save = save
    return weights, last


_single: dict[str, tuple[dict[int, torch.Tensor], dict[str, float]]] = {}


def _compare(mesh, steps, dtype, changes, tolerance):
    native = {key: value for key, value in changes.items() if not key.startswith("parallel.")}
    native["engine"] = "native"
    key = repr((steps, dtype, native))
    if key not in _single:
        (_single[key],) = on_ranks(1, _trained, (1, 1, 1, 1), steps, dtype, native)
    expected, expected_metrics = _single[key]
    found: dict[int, torch.Tensor] = {}
    metrics: dict[str, float] = {}
    for weights, last in on_ranks(
        mesh[0] * mesh[1] * mesh[2], _trained, mesh, steps, dtype, changes
    ):
        for i, weight in weights.items():
            assert i not in found or torch.equal(weight, found[i]), "ranks disagree"
        found |= weights
        metrics |= last
    assert found.keys() == expected.keys()
    for i, weight in expected.items():
        error = float((found[i] - weight).norm() / weight.norm())
        assert error <= tolerance, f"layer {i}: {error}"
    compared, others = (
        {name for name in values if metric(name).panel != "speed"} - {"time"}
        for values in (metrics, expected_metrics)
    )
    assert compared == others
    for name in compared:
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=100 * tolerance, abs=1e-9)


@pytest.mark.parametrize("mesh", MESHES)
def test_fp64_weights_after_200_steps(mesh):
    _compare(mesh, 200, "float64", {}, 1e-9)


@pytest.mark.parametrize("mesh", MESHES[:4])
def test_fp32_weights_after_30_steps(mesh):
    _compare(mesh, 30, "float32", {}, 1e-4)


def test_a_process_without_units():
    _compare((1, 1, 4, 1), 20, "float64", {"model.widths": [36, 5]}, 1e-9)


# |z| at the top repels units from its kink and magnifies rounding at once; tanh does not.
NETWORK = {"objective.scope": "network", "model.nonlinearity": "tanh"}


SHARDED = {"parallel.shard": "weights"}
PAIRS = SHARDED | {"parallel.dp_shard": 2}
# Adam would divide a bias' gradient, here but rounding, by its size.
CLIPPED = {
    "optimizer.clip": 0.5,
    "optimizer.name": "SGD",
    "optimizer.lr": 0.005,
    "model.bias": True,
}


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ((1, 2, 1, 1), SHARDED),
        ((1, 2, 2, 2), SHARDED | NETWORK),
        ((1, 2, 2, 1), {"parallel.shard": "optimizer"} | CLIPPED),
        ((2, 2, 1, 2), SHARDED | NETWORK | CLIPPED),
        ((1, 4, 1, 1), {"parallel.shard": "weights", "model.widths": [36, 5]}),  # one has no row
        ((1, 4, 1, 1), PAIRS | CLIPPED),
        ((1, 4, 1, 2), PAIRS | NETWORK),
    ],
)
def test_rows_spread_over_dp(mesh, changes):
    _compare(mesh, 25, "float64", changes, 1e-9)


@pytest.mark.parametrize("mesh", [(1, 1, 2, 1), (1, 2, 1, 2)])
def test_bfloat16_products_move_float32_weights(mesh):
    changes = {"train.compute": "bfloat16", "parallel.shard": "weights"}
    _compare(mesh, 10, "float32", changes, 2e-2)


@pytest.mark.parametrize("mesh", [(2, 1, 1, 1), (2, 1, 2, 3), (3, 1, 1, 2)])
def test_one_objective_of_a_network_over_several_stages(mesh):
    _compare(mesh, 25, "float64", NETWORK, 1e-9)


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ((1, 1, 2, 1), {"engine": "fairscale", "model.widths": [36, 18, 10]}),
        ((1, 2, 1, 1), {"engine": "deepspeed", "deepspeed.zero": 3}),
        ((2, 1, 1, 1), {"engine": "deepspeed", "deepspeed.zero": 0}),
    ],
)
def test_other_engines(mesh, changes):
    optimizer = {"optimizer.name": "AdamW", "optimizer.lr": 0.002}
    _compare(mesh, 20, "float32", NETWORK | optimizer | changes, 1e-4)


@pytest.mark.parametrize("mesh", [(1, 2, 2, 2), (1, 1, 1, 3)])
@pytest.mark.parametrize(
    "changes",
    [
        NETWORK,
        {"objective.on": "post", "model.nonlinearity": "tanh", "model.bias": True},
        {"objective.noise_correction": True, "train.batch": 24},  # dual: fewer samples than units
        {"optimizer.name": "AdamW", "optimizer.lr": 0.002},
    ],
)
def test_every_other_objective_and_optimizer_too(mesh, changes):
    _compare(mesh, 25, "float64", changes, 1e-9)


def test_the_local_rate_is_another_objective():
    exact = on_ranks(2, _trained, (1, 2, 1, 1), 10, "float64", {})[0][0]
    local = on_ranks(2, _trained, (1, 2, 1, 1), 10, "float64", {"objective.batch_scope": "local"})
    assert torch.equal(local[0][0][0], local[1][0][0])
    assert not torch.allclose(exact[0], local[0][0][0], rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pp": 4}, "parallel.pp=4 is more than the 3 layers"),
        ({"tp": 11}, "parallel.tp=11 is more than the 10 units"),
        ({"dp": 5}, "train.batch=96 does not divide by parallel.dp=5"),
        ({"microbatches": 0}, "parallel.microbatches=0"),
        ({"dp": 4, "dp_shard": 2}, "parallel.dp_shard=2 with parallel.shard=none"),
        (
            {"dp": 4, "dp_shard": 3, "shard": "weights"},
            r"parallel.dp_shard=3 does not divide parallel.dp=4; use one of \[1, 2, 4\]",
        ),
        ({"device": "tpu"}, "'tpu'"),
    ],
)
def test_a_mesh_that_cannot_be_is_named(changes, named):
    config = small_config(1, "float32", (1, 1, 1, 1))
    for name, value in changes.items():
        setattr(config.parallel, name, value)
    with pytest.raises(InputError, match=named):
        config.validate()


def test_a_mesh_of_another_size_than_the_job_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = small_config(1, "float32", (1, 1, 2, 1))
    with (
        pytest.raises(InputError, match="needs 2 processes, but 3 were started"),
        open_mesh(config.parallel),
    ):
        pass
