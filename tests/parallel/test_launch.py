"""Ranks find each other whoever starts them."""

import pytest

from dense2conv.parallel.launch import adopt_slurm, inside_job

SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_slurm_tasks_become_ranks(monkeypatch):
    import os

    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    adopt_slurm()
    assert inside_job()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == (
        "3",
        "4",
        "1",
    )
    assert os.environ["MASTER_ADDR"] == "10.0.0.7"
    assert 20000 <= int(os.environ["MASTER_PORT"]) < 40000


@pytest.mark.parametrize("missing", ["SLURM_STEP_ID", "SLURM_PROCID"])
def test_a_batch_script_itself_is_no_rank(monkeypatch, missing):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    adopt_slurm()
    assert not inside_job()
