"""No process holds a whole weight: what phases of a run add to the resident memory at tp=4.

Extraction is not among them yet.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import on_ranks

TP = 4
BUFFER = 48 * 2**20  # activations, batches, pieces of rows, and what libraries take when first used
CONFIG = [
    "data=noise",
    "data.side=96",
    "model.widths=[4096]",  # 151 MB: any copy of it is above the mark by more than the buffer
    "train.batch=64",
    "train.dtype=float32",
    "wandb.mode=disabled",
    "parallel.device=cpu",
    f"parallel.tp={TP}",
]


def _resident(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if name in x)
    return int(line.split()[1]) * 1024


def _grown(phase: Callable[[], object]) -> int:
    """By how many bytes the process was larger, at its largest, than before the phase."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    phase()
    return _resident("VmHWM") - before


def _phases(root):
    """What each phase has added, and the own share of the weight, in bytes."""
    from dense2conv.cli import load_config
    from dense2conv.data import open_source
    from dense2conv.objectives import EfficientCoding
    from dense2conv.parallel import open_mesh
    from dense2conv.parallel.engines import NativeEngine
    from dense2conv.training.checkpoint import Checkpoints
    from dense2conv.training.loop import build_stack, identity, next_batch
    from dense2conv.training.optim import make_optimizer
    from dense2conv.training.prune import prune
    from dense2conv.training.run_folder import RunFolder

    config = load_config("train", [*CONFIG, f"run.root={root}", "run.name=run"])
    batch, grown = config.train.batch, {}
    with open_mesh(config.parallel) as mesh:
        folder = RunFolder(Path(root))
        folder.fields.mkdir(parents=True, exist_ok=True)
        source = open_source(config.data, config.seed)
        held = []

        def init():
            held.append(build_stack(config, mesh, len(source.geometry)).init(config.seed))

        grown["init"] = _grown(init)
        (stack,) = held
        optimizer = make_optimizer(config.optimizer, stack, config.objective.l1)
        objective = EfficientCoding(config.objective, stack.activation)
        engine = NativeEngine(mesh, stack, objective, optimizer, batch)

        def step():
            engine.forward_backward(next_batch(config, mesh, source, 0, range(batch)))
            engine.step(config.optimizer.lr)

        grown["step"] = _grown(step)

        def save():
            checkpoints = Checkpoints(
                config.checkpoint, folder.checkpoints, mesh, identity(config), 60
            )
            checkpoints.save(1, stack, optimizer)
            checkpoints.wait()

        grown["checkpoint"] = _grown(save)
        layer = stack.layer(0)
        share = layer.weight.nbytes
        grown["gather"] = _grown(lambda: mesh.tp.gather(layer.weight.detach(), layer.num_units))
        held.clear()
        stack = optimizer = engine = layer = None
        grown["prune"] = _grown(lambda: prune(config, mesh, folder))
    return grown, share


SHARES = {  # of the weight, that a phase is allowed
    "init": 1,
    "step": 2,  # gradient and momentum
    "checkpoint": 2,  # weight and momentum in host memory
    "prune": 4.5,  # weight, momentum, and both once more in host memory; a mask, a byte a weight, too
}


@pytest.fixture(scope="module")
def ranks():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not say how much a process holds")
    root = tempfile.mkdtemp()
    yield on_ranks(TP, _phases, root)
    shutil.rmtree(root)


@pytest.mark.parametrize("phase", SHARES)
def test_a_phase_holds_its_share(ranks, phase):
    for grown, share in ranks:
        print(f"{phase}: {grown[phase] / 1e6:.0f} MB, share {share / 1e6:.0f} MB")
        assert grown[phase] <= SHARES[phase] * share + BUFFER


def test_a_gathered_weight_would_be_seen(ranks):
    for grown, share in ranks:
        assert grown["gather"] > 2 * share + BUFFER
