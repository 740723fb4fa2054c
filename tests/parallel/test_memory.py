"""No process holds a whole weight: what phases of a run add to the resident memory at tp=4."""

import ctypes
import gc
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
    "extract.samples=64",
    "extract.sampled_units=512",
    "extract.padding=zeros",
    "tune.steps=2",
]
HELD_OUT = 64  # images that an extracted network is judged on here
UNITS_OF_NOISE = 128  # a process; of the layer whose noise is corrected for


LIBC = ctypes.CDLL(None)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def _resident(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if name in x)
    return int(line.split()[1]) * 1024


def _grown(phase: Callable[[], object]) -> int:
    """By how many bytes the process was larger, at its largest, than before the phase."""
    gc.collect()
    LIBC.malloc_trim(0)  # or a phase would use, unseen, what another one has freed
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    phase()
    return _resident("VmHWM") - before


def _planted(weight, units, side):
    """Fill own rows with one kernel at the units' places, and every 50th with something else."""
    import torch

    kernel = torch.tensor([[0, -0.2, 0], [-0.2, 1, -0.2], [0, -0.2, 0]])
    weight.zero_()
    images = weight.view(len(weight), side, side)
    for row, unit in enumerate(units):
        y, x = divmod(unit * 2, side - 2)
        if unit % 50 == 0:
            images[row, y, ::7] = 1.0
        elif y < side - 2:
            images[row, y : y + 3, x : x + 3] = kernel * (1 + unit % 3)


def _phases(root):
    """What each phase has added, and the own share of the weight, in bytes."""
    from dense2conv.cli import load_config
    from dense2conv.data import open_source
    from dense2conv.objectives import EfficientCoding
    from dense2conv.parallel import open_mesh
    from dense2conv.parallel.engines import NativeEngine
    from dense2conv.training import extract as extraction
    from dense2conv.training.checkpoint import Checkpoints
    from dense2conv.training.loop import build_stack, identity, next_batch
    from dense2conv.training.optim import make_optimizer
    from dense2conv.training.prune import prune
    from dense2conv.training.run_folder import RunFolder

    for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        LIBC.mallopt(threshold, 1 << 20)  # what is freed leaves: figures are of what is held
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

        def save(step):
            checkpoints = Checkpoints(
                config.checkpoint, folder.checkpoints, mesh, identity(config), 60
            )
            checkpoints.save(step, stack, optimizer)
            checkpoints.wait()

        grown["checkpoint"] = _grown(lambda: save(1))
        layer = stack.layer(0)
        share = layer.weight.nbytes
        grown["gather"] = _grown(lambda: mesh.tp.gather(layer.weight.detach(), layer.num_units))
        held.clear()
        stack = optimizer = engine = layer = None
        grown["prune"] = _grown(lambda: prune(config, mesh, folder))

        extraction.NUM_HELD_OUT = HELD_OUT
        found = {}

        def extract(name):
            def phase():
                found[name] = extraction.extract(config, mesh, folder, source)

            grown[f"extract {name}"] = _grown(phase)

        extract("random rows")
        stack = build_stack(config, mesh, len(source.geometry))
        layer = stack.layer(0)
        _planted(layer.weight.data, layer.units, config.data.side)
        optimizer = make_optimizer(config.optimizer, stack, config.objective.l1)
        save(2)
        stack = optimizer = layer = None
        extract("a convolution")
        grown["noise correction"] = _noise_correction(mesh, share)
    return grown, share, found


def _noise_correction(mesh, share):
    """The term and its gradient, of fewer units: d×d matrices are the same on every process."""
    import torch

    from dense2conv.objectives import EfficientCoding, ObjectiveConfig
    from dense2conv.shapes import Layout

    units, num_inputs = TP * UNITS_OF_NOISE, share // 4 // UNITS_OF_NOISE
    weight = torch.randn(UNITS_OF_NOISE, num_inputs).mul_(0.01).requires_grad_()
    z = torch.zeros(2, UNITS_OF_NOISE)
    objective = EfficientCoding(ObjectiveConfig(noise_correction=True), lambda z: z, 0.1)
    layout = Layout(features=mesh.tp)
    return _grown(lambda: objective(z, 2, units, layout, weight).loss.backward())


SHARES = {  # of the weight, that a phase is allowed
    "init": 1,
    "step": 2,  # gradient and momentum
    "checkpoint": 2,  # weight and momentum in host memory
    "prune": 3,  # weight, momentum, and the momentum's file while it is read
    # Weight; the non-zeros of all processes as left-over rows, 12 bytes each, that is 0.6 shares; what
    # tuning adds to these: the tuned ones, a gradient, two momenta, and what makes them.
    "extract random rows": 3.5,
    "extract a convolution": 2,  # weight, and its file while it is read
    "noise correction": 1,  # the gradient
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
    for grown, share, _ in ranks:
        print(f"{phase}: {grown[phase] / 1e6:.0f} MB, share {share / 1e6:.0f} MB")
        assert grown[phase] <= SHARES[phase] * share + BUFFER


def test_a_gathered_weight_would_be_seen(ranks):
    for grown, share, _ in ranks:
        assert grown["gather"] > 2 * share + BUFFER


def test_what_was_extracted(ranks):
    for *_, found in ranks:
        assert found["random rows"]["left_over_fraction"] == 1
        assert found["a convolution"]["num_kernels"] == 1
        assert found["a convolution"]["left_over_fraction"] < 0.05
