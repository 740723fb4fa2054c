"""``dense2conv doctor`` tells what is there, and ends where something is wrong."""

import os
from pathlib import Path

import pytest
import torch

from dense2conv.bench.doctor import Doctor, doctor
from dense2conv.cli import main
from dense2conv.parallel import ParallelConfig, open_mesh
from dense2conv.parallel.collectives import GroupAxis
from dense2conv.shapes import InputError
from tests.ranks import on_ranks


def test_it_names_versions_machine_and_disk(capsys, tmp_path):
    assert main(["doctor", f"root={tmp_path}/runs", "parallel.device=cpu"]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    assert "GFLOP/s" in text
    assert "rank 0" in text
    assert "MB/s written" in text
    assert not list(Path(tmp_path).iterdir())


def test_a_folder_that_cannot_be_written_is_named(capsys):
    assert main(["doctor", "root=/proc/runs", "parallel.device=cpu"]) == 2
    assert "root=/proc/runs: nothing can be written there" in capsys.readouterr().err


def _look(broken: bool) -> str:
    if broken:  # an axis on which numbers get lost
        GroupAxis.sum = lambda self, tensor: tensor
    config = Doctor(parallel=ParallelConfig(dp=2, tp=2, device="cpu"), mebibytes=1)
    with open_mesh(config.parallel) as mesh:
        try:
            doctor(config, mesh)
        except InputError as error:
            return str(error)
    return os.environ["RANK"]


def test_every_axis_is_tried():
    assert on_ranks(4, _look, False) == ["0", "1", "2", "3"]


def test_an_axis_that_loses_numbers_is_named():
    assert all(text.startswith("axis dp: 1 + … + 2 did not") for text in on_ranks(4, _look, True))


@pytest.mark.parametrize("word", ["mebibytes=0", "parallel.device=tpu"])
def test_bad_input_is_refused(word, capsys):
    assert main(["doctor", word]) == 2
    assert word.split("=")[0] in capsys.readouterr().err
