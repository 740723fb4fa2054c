"""A set that vanishes while a run trains on it: it is saved first, and all processes say why."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file

from dense2conv.data import open_source
from dense2conv.parallel import open_mesh
from dense2conv.shapes import InputError
from dense2conv.training import checkpoint, loop
from dense2conv.training.config import Config
from dense2conv.training.run_folder import RunFolder
from tests.ranks import on_ranks
from tests.training.test_signals import begin, parallel

STEPS = 16


def make_set(root: Path) -> None:
    generator = np.random.default_rng(0)
    for split, number in (("train", 40), ("val", 4)):
        for i in range(number):
            path = root / split / "class" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (6, 6), np.uint8)).save(path)


def _train(mesh_sizes, runs, roots, lost_by, at):
    """Train until the set that rank ``lost_by`` reads is renamed in step ``at``; what it ended with."""
    config = Config()
    config.data.kind, config.data.side, config.data.statistics_samples = "imagenet", 6, 8
    config.model.widths = [36, 17]
    config.train.batch, config.train.steps, config.train.dtype = 16, STEPS, "float64"
    config.checkpoint.every, config.resume = 100, True
    config.parallel = parallel(mesh_sizes)
    rates = loop.learning_rate

    with open_mesh(config.parallel) as mesh:
        root = Path(roots[dist.get_rank()])
        config.data.root = str(root)

        def lose(optimizer, step, steps):
            if (dist.get_rank(), step) == (lost_by, at):
                root.rename(f"{root}-elsewhere")
            return rates(optimizer, step, steps)

        loop.learning_rate = lose
        folder = RunFolder(Path(runs))
        folder.fields.mkdir(parents=True, exist_ok=True)
        try:
            loop.train(config, mesh, folder, open_source(config.data, config.seed), [])
        except InputError as error:
            return str(error)
    return None


@pytest.mark.parametrize(
    "mesh",
    [
        (1, 1, 1),
        (1, 1, 2),
        *(pytest.param(m, marks=pytest.mark.slow) for m in [(1, 2, 1), (2, 1, 1)]),
    ],
)
def test_the_last_whole_step_is_saved_and_the_resumed_run_is_the_undisturbed_one(mesh, tmp_path):
    size = mesh[0] * mesh[1] * mesh[2]
    roots = [str(tmp_path / f"images-of-{rank}") for rank in range(size)]
    for root in roots:
        make_set(Path(root))
    lost_by = 0 if mesh[0] > 1 else size - 1  # a later stage reads none
    assert on_ranks(size, _train, mesh, str(tmp_path / "whole"), roots, -1, 0) == [None] * size
    ends = on_ranks(size, _train, mesh, str(tmp_path / "parts"), roots, lost_by, 4)

    saved = checkpoint.latest(tmp_path / "parts" / "checkpoints")
    step = json.loads((saved / "state.json").read_text())["step"]
    assert 4 < step < STEPS
    assert ends == [ends[0]] * size
    assert ends[0] == (
        f"{roots[lost_by]}/train, which holds images of this run, is gone (No such file or directory); "
        f"bring it back; step {step} of {STEPS} is saved: carry on from there with resume=true"
    )
    Path(f"{roots[lost_by]}-elsewhere").rename(roots[lost_by])
    assert on_ranks(size, _train, mesh, str(tmp_path / "parts"), roots, -1, 0) == [None] * size
    whole, parts = (tmp_path / name / "checkpoints" for name in ("whole", "parts"))
    for shard in (whole / f"step_{STEPS:08d}").glob("*.safetensors"):
        tensors = load_file(parts / f"step_{STEPS:08d}" / shard.name)
        for name, value in load_file(shard).items():
            assert torch.equal(tensors[name], value), name


@pytest.mark.slow
def test_the_command_names_the_path_and_the_remedy_in_its_last_line(tmp_path):
    make_set(tmp_path / "images")
    words = ["data=imagenet", "data.root=images", "data.side=6", "data.statistics_samples=8"]
    words += ["model.widths=[36,17]", "train.batch=16", "train.steps=1000000"]
    words += ["log.every=5", "wandb.mode=disabled", "parallel.device=cpu", "parallel.tp=2"]
    run = begin(tmp_path, words)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2
    saved = checkpoint.latest(tmp_path / "runs/run/checkpoints")
    step = json.loads((saved / "state.json").read_text())["step"]
    assert errors.strip().splitlines()[-1] == (
        "dense2conv: images/train, which holds images of this run, is gone (No such file or directory); "
        f"bring it back; step {step} of 1000000 is saved: carry on from there with resume=true"
    )
