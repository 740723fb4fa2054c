"""The images' recipes, as far as they can be judged without building them."""

import shutil
import subprocess
from pathlib import Path

import pytest

RECIPES = sorted((Path(__file__).parent.parent / "docker").iterdir())


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path):
    done = subprocess.run(["hadolint", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
