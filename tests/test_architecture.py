"""Imports go down only: a room may import those on lower floors, and packages have their rooms."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dense2conv"
FLOORS = {
    **dict.fromkeys(["shapes", "rng", "files", "bar", "nonlinearities"], 0),
    **dict.fromkeys(["data", "models", "objectives", "pruning", "structure"], 1),
    "parallel": 2,
    "training": 3,
    "planner": 3,
    "report": 4,
    "bench": 4,
    "configuration": 4,
    "phases": 5,
    "completion": 5,
    "sweeps": 6,
    "cli": 7,
    "__main__": 8,
    "__init__": 8,
}
BELOW = {
    "nonlinearities": {"shapes"},
    "planner": {"training"},
}  # rooms that may use one beside them
HOMES = {
    "torch.distributed": {"parallel", "training/checkpoint.py", "bench/step_rivals.py"},
    "deepspeed": {"parallel", "bench/step_rivals.py"},
    "fairscale": {"parallel", "bench/step_rivals.py"},
    "wandb": {"training/metrics.py"},
    "hydra": {"configuration.py", "sweeps.py"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    relative = path.relative_to(PACKAGE)
    room = relative.parts[0].removesuffix(".py")
    for name in _imports(path):
        if not name.startswith("dense2conv.") or name.startswith("dense2conv.__version__"):
            continue
        other = name.split(".")[1]
        same_room = other == room
        allowed = same_room or FLOORS[other] < FLOORS[room] or other in BELOW.get(room, set())
        assert allowed, f"{relative} (floor {FLOORS[room]}) imports {name} (floor {FLOORS[other]})"


@pytest.mark.parametrize("package", HOMES)
def test_packages_stay_in_their_rooms(package):
    for path in MODULES:
        relative = str(path.relative_to(PACKAGE))
        if any(relative.startswith(home) for home in HOMES[package]):
            continue
        users = [n for n in _imports(path) if n == package or n.startswith(package + ".")]
        assert not users, f"{relative} imports {users}"
