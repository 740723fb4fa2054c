"""Every engine, on any mesh, takes the steps that one process takes."""

import contextlib
import io
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dense2conv.models import DenseStack, ModelConfig
from dense2conv.objectives import EfficientCoding, ObjectiveConfig
from dense2conv.parallel import ParallelConfig, open_mesh
from dense2conv.parallel.engines import DeepspeedConfig, make_engine, validate_engine
from dense2conv.parallel.mesh import make_mesh
from dense2conv.shapes import SINGLE, InputError
from dense2conv.training.checkpoint import CheckpointConfig, Checkpoints
from dense2conv.training.optim import OptimizerConfig, make_optimizer
from tests.ranks import on_ranks

D, WIDTHS, M, STEPS = 21, [16, 14, 12, 10], 24, 20
LR = {"prox_adam": 0.02, "AdamW": 0.002, "SGD": 0.005}


@dataclass(frozen=True)
class Case:
    engine: str = "native"
    scope: str = "layerwise"
    optimizer: str = "prox_adam"
    dtype: torch.dtype = torch.float64
    zero: int = 0
    offload: bool = False
    clip: float | None = None
    microbatches: int = 1
    standardise: bool = True
    bias: bool = False
    noise_correction: bool = False
    masked: bool = False


def make_stack(case, layout=SINGLE, stages=None):
    model = ModelConfig(WIDTHS, "tanh", case.bias, case.standardise)
    stack = DenseStack(D, model, layout, stages).to(case.dtype).init(0)
    for i in stack.indices if case.masked else []:
        weight = stack.layer(i).weight
        stack.layer(i).set_mask(weight.abs() > 0.03)
    return stack


def start(case, mesh, checkpoints=None):
    """The case's stack, optimizer and engine, where the last checkpoint left them."""
    stack = make_stack(case, mesh.layout, mesh.stage(len(WIDTHS)))
    config = OptimizerConfig(name=case.optimizer, lr=LR[case.optimizer])
    optimizer = make_optimizer(config, stack, l1=0.03)
    if checkpoints is not None:
        checkpoints.resume(stack, optimizer)
    config = ObjectiveConfig(scope=case.scope, noise_correction=case.noise_correction)
    objective = EfficientCoding(config, stack.activation, input_noise_std=0.1)
    zero = DeepspeedConfig(case.zero, case.offload)
    share = (mesh, stack, objective, optimizer, M, case.microbatches, case.clip)
    return stack, optimizer, make_engine(case.engine, zero, *share)


def advance(case, mesh, engine, steps):
    """The losses of the last of ``steps``."""
    own = mesh.dp.shard(M)
    terms = {}
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(M, D, generator=generator, dtype=torch.float64)
        x = x.cumsum(1).to(case.dtype) / 3  # correlated, as pixels are
        terms = engine.forward_backward(x[own.start : own.stop] if engine.takes_images else None)
        engine.step(LR[case.optimizer])
    engine.drain()
    return {name: float(value.loss) for name, value in terms.items()}


def _train(sizes, cases):
    """Whole weights and last losses of each case, one after the other, on a mesh (pp, dp, tp)."""
    pp, dp, tp = sizes
    results = []
    with open_mesh(ParallelConfig(pp=pp, dp=dp, tp=tp)) as mesh:
        for case in cases:
            stack, _, engine = start(case, mesh)
            losses = advance(case, mesh, engine, range(STEPS))
            with engine.whole():
                weights = {
                    name: mesh.tp.gather(
                        p.detach().clone(), WIDTHS[int(name.split(".")[1][5:]) - 1]
                    )
                    for name, p in stack.named_parameters()
                }
            results.append((weights, losses))
    return results


_single = {}


def alone(case):
    """What this process alone makes of the case with the native engine, once."""
    case = replace(case, engine="native", microbatches=1, zero=0, offload=False)
    if case not in _single:
        (_single[case],) = _train((1, 1, 1), [case])
    return _single[case]


def compare(sizes, cases):
    pp, dp, tp = sizes
    ranks = on_ranks(pp * dp * tp, _train, sizes, cases)
    for k, case in enumerate(cases):
        tolerance = 1e-9 if case.dtype == torch.float64 else 1e-4
        expected_weights, expected_losses = alone(case)
        weights = {name: w for results in ranks for name, w in results[k][0].items()}
        losses = {name: value for results in ranks for name, value in results[k][1].items()}
        assert weights.keys() == expected_weights.keys()
        assert losses == pytest.approx(expected_losses, abs=tolerance), case
        for name, expected in expected_weights.items():
            error = float((weights[name] - expected).norm() / expected.norm())
            assert error <= tolerance, f"{case} on {sizes}: {name} is off by {error}"
        for results in ranks:  # ranks that hold the same layer agree to the last bit
            assert all(torch.equal(w, weights[name]) for name, w in results[k][0].items())


NATIVE = [
    Case("native", "network"),
    Case("native", "network", microbatches=3),
    Case("native", "network", microbatches=4, standardise=False, noise_correction=True),
    Case("native", "network", "SGD", clip=0.1, microbatches=2, bias=True),
    Case("native", "layerwise", "SGD", clip=0.1, bias=True),
]


@pytest.mark.parametrize("sizes", [(2, 1, 1), (2, 1, 2), (2, 2, 1)])
def test_gradients_cross_the_stages_and_are_clipped_by_scope(sizes):
    compare(sizes, NATIVE)


def test_clipping_is_one_norm_of_all_layers_or_one_a_layer():
    for scope in ("network", "layerwise"):
        with open_mesh(ParallelConfig()) as mesh:
            case = Case(scope=scope, clip=1e-3)
            stack, optimizer, engine = start(case, mesh)
            norms = []
            optimizer.register_step_pre_hook(
                lambda *_, stack=stack, norms=norms: norms.extend(
                    float(p.grad.norm()) for p in stack.parameters()
                )
            )
            advance(case, mesh, engine, range(1))
        if scope == "layerwise":
            assert norms == pytest.approx([1e-3] * len(WIDTHS), rel=1e-3)
        else:
            assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(1e-3, rel=1e-3)
            assert min(norms) > 0


FAIRSCALE = [
    Case("fairscale"),
    Case("fairscale", "network", "SGD", clip=0.1, microbatches=2, bias=True),
    Case("fairscale", "network", "AdamW", torch.float32),
]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 2), (1, 2, 2)])
def test_fairscale(sizes):
    compare(sizes, FAIRSCALE)


def _column_then_row():
    """Gradients of Σ c·z₂ by our layers on tp, and by FairScale's pair, which splits both ways."""
    from fairscale.nn.model_parallel import initialize, layers

    generator = torch.Generator().manual_seed(0)
    x, c = (torch.randn(M, n, generator=generator, dtype=torch.float64) for n in (D, WIDTHS[1]))
    with open_mesh(ParallelConfig(tp=2)) as mesh:
        stack = make_stack(Case(standardise=False), mesh.layout)
        weight = mesh.tp.gather(stack.layer(1).weight.detach(), WIDTHS[1])
        units, inputs = mesh.tp.shard(WIDTHS[1]), mesh.tp.shard(WIDTHS[0])
        z = stack(x)["layer2"]
        (z * c[:, units.start : units.stop]).sum().backward()
        with contextlib.redirect_stdout(io.StringIO()):
            initialize.initialize_model_parallel(2)
        column = layers.ColumnParallelLinear(D, WIDTHS[0], bias=False, gather_output=False).double()
        row = layers.RowParallelLinear(*WIDTHS[:2], bias=False, input_is_parallel=True).double()
        column.weight.data.copy_(stack.layer(0).weight)
        row.weight.data.copy_(weight[:, inputs.start : inputs.stop])
        y = row(stack.activation(column(x)))
        (y * c).sum().backward()
        own = mesh.tp.gather(stack.layer(1).weight.grad, WIDTHS[1])[:, inputs.start : inputs.stop]
        return (
            float((y[:, units.start : units.stop] - z).abs().max()),
            float((column.weight.grad - stack.layer(0).weight.grad).abs().max()),
            float((row.weight.grad - own).abs().max()),
        )


def test_our_layers_are_those_of_fairscales_column_and_row_pair():
    for errors in on_ranks(2, _column_then_row):
        assert max(errors) < 1e-12


ZERO = Case("deepspeed", "network", "AdamW", torch.float32)
DEEPSPEED = [
    replace(ZERO, clip=0.1, optimizer="SGD", bias=True),
    replace(ZERO, zero=1, masked=True, clip=0.1),
    replace(ZERO, zero=2, microbatches=2, clip=0.1, optimizer="SGD", bias=True),
    replace(ZERO, zero=3, offload=True, clip=0.1, optimizer="SGD", bias=True),
    replace(ZERO, zero=3, masked=True, scope="layerwise", noise_correction=True),
    replace(ZERO, zero=2, offload=True, scope="layerwise", noise_correction=True),
    replace(ZERO, zero=0, optimizer="prox_adam", scope="layerwise", masked=True),
]


@pytest.mark.parametrize(
    ("sizes", "cases"),
    [((1, 1, 1), DEEPSPEED), ((1, 2, 1), DEEPSPEED), ((1, 2, 2), DEEPSPEED[:5])],
)
def test_deepspeed(sizes, cases):
    compare(sizes, cases)


PIPELINED = [
    replace(ZERO, masked=True, noise_correction=True),
    replace(ZERO, clip=0.1, optimizer="SGD", bias=True),
    replace(ZERO, zero=1, offload=True, clip=0.1, optimizer="SGD", bias=True),
    replace(ZERO, optimizer="prox_adam", standardise=False),
]


@pytest.mark.parametrize("sizes", [(2, 1, 2), (2, 2, 1)])
def test_deepspeeds_pipeline(sizes):
    compare(sizes, PIPELINED)


def _handed_over(folder, links):
    """Five steps on each link's mesh (pp, dp, tp) and engine, from the checkpoint of the one before."""
    with open_mesh(ParallelConfig(tp=4)) as whole:
        for done, (sizes, case) in zip(range(0, STEPS, 5), links, strict=True):
            mesh = make_mesh(*sizes, whole.device)
            checkpoints = Checkpoints(CheckpointConfig(keep=1), folder, mesh, {}, 60)
            stack, optimizer, engine = start(case, mesh, checkpoints)
            advance(case, mesh, engine, range(done, done + 5))
            with engine.whole(with_optimizer=True):
                checkpoints.save(done + 5, stack, optimizer)
            checkpoints.wait()


SMOOTH = replace(ZERO, bias=True, standardise=False)
LINKS = [
    [
        ((1, 1, 4), replace(ZERO, engine="native")),
        ((2, 1, 2), replace(ZERO, zero=1)),
        ((1, 2, 2), replace(ZERO, zero=3)),
        ((2, 2, 1), replace(ZERO, engine="native")),
    ],
    [
        ((1, 4, 1), replace(SMOOTH, zero=2)),
        ((1, 2, 2), replace(SMOOTH, zero=1, offload=True)),
        ((2, 2, 1), SMOOTH),
        ((1, 1, 4), replace(SMOOTH, zero=2)),
    ],
]


@pytest.mark.parametrize("links", LINKS)
def test_a_run_goes_on_on_another_mesh_with_another_engine(links, tmp_path):
    on_ranks(4, _handed_over, tmp_path, links)
    with open_mesh(ParallelConfig()) as mesh:
        native = replace(links[0][1], engine="native", zero=0)
        found, found_optimizer, _ = start(
            native, mesh, Checkpoints(CheckpointConfig(), tmp_path, mesh, {}, 60)
        )
        expected, optimizer, engine = start(native, mesh)
        advance(native, mesh, engine, range(STEPS))
    for p, q in zip(expected.parameters(), found.parameters(), strict=True):
        state = found_optimizer.state[q]
        assert state.keys() == optimizer.state[p].keys()
        for value, other in [(p, q), *((optimizer.state[p][key], state[key]) for key in state)]:
            assert float((value - other).detach().norm()) <= 1e-4 * float(value.detach().norm())
    for buffer, other in zip(expected.buffers(), found.buffers(), strict=True):
        assert float((buffer - other).norm()) <= 1e-4 * float(buffer.norm())


def _said_by_deepspeed():
    from torch.utils import cpp_extension

    def compiled(*_, **__):
        raise AssertionError("DeepSpeed compiles")

    cpp_extension.load = compiled
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        open_mesh(ParallelConfig(dp=2)) as mesh,
    ):
        for sizes, zero in [((1, 2, 1), 1), ((1, 2, 1), 3), ((2, 1, 1), 1)]:
            mesh = make_mesh(*sizes, mesh.device)
            stack, _, engine = start(replace(ZERO, zero=zero), mesh)
            advance(ZERO, mesh, engine, range(2))
            if zero == 3:  # weights are in shards, but for the call of their layer
                assert not any(p.numel() for p in stack.parameters())
                assert not engine.deepspeed.module._external_params
    return said.getvalue()


def test_deepspeed_compiles_nothing_and_is_quiet():
    assert on_ranks(2, _said_by_deepspeed) == ["", ""]


def test_an_engine_is_imported_only_when_it_is_chosen():
    code = (
        "import sys, dense2conv.cli, dense2conv.parallel.engines as e\n"
        "print({m.split('.')[0] for m in sys.modules} & {'deepspeed', 'fairscale'})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


class _Products(TorchDispatchMode):
    """Shapes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("scope", ["layerwise", "network"])
def test_no_gradient_of_the_images_is_made(scope):
    with open_mesh(ParallelConfig()) as mesh:
        case = Case(scope=scope)
        _, _, engine = start(case, mesh)
        with _Products() as products:
            advance(case, mesh, engine, range(1))
    assert (WIDTHS[0], D) in products.shapes  # of the first layer's weights
    assert (M, D) not in products.shapes


def _validate(engine="deepspeed", optimizer="AdamW", dtype=torch.float32, clip=None, **groups):
    def of(schema):
        return schema(**groups.get(schema.__name__.removesuffix("Config").lower(), {}))

    validate_engine(
        engine,
        of(DeepspeedConfig),
        of(ParallelConfig),
        of(ModelConfig),
        of(ObjectiveConfig),
        optimizer,
        dtype,
        clip,
    )


@pytest.mark.parametrize("engine", ["native", "fairscale", "deepspeed"])
def test_engines_that_can_are_let_pass(engine):
    _validate(engine, parallel={"dp": 2})
    _validate(engine, clip=1.0, objective={"scope": "network"}, parallel={"tp": 2})


def test_deepspeeds_combinations_are_let_pass():
    _validate(parallel={"pp": 2, "tp": 2}, objective={"scope": "network"}, deepspeed={"zero": 1})
    _validate(parallel={"dp": 2, "tp": 2}, deepspeed={"zero": 3, "offload": True})
    _validate(parallel={"tp": 4}, model={"widths": [256, 5]}, deepspeed={"zero": 2})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"engine": "horovod"}, "'horovod' is unknown; use one of native, fairscale, deepspeed"),
        ({"engine": "native", "clip": -1.0}, "optimizer.clip=-1.0"),
        ({"engine": "fairscale", "parallel": {"pp": 2}}, "parallel.pp=2 with engine=fairscale"),
        ({"engine": "fairscale", "parallel": {"tp": 3}}, "256 do not divide by parallel.tp=3"),
        ({"deepspeed": {"zero": 4}}, "deepspeed.zero=4 is no stage"),
        ({"parallel": {"pp": 2}}, "objective.scope=layerwise and parallel.pp=2 with engine=deeps"),
        (
            {"parallel": {"pp": 2, "microbatches": 4}, "objective": {"scope": "network"}},
            "parallel.microbatches=4 and parallel.pp=2 with engine=deepspeed",
        ),
        (
            {"parallel": {"pp": 2}, "objective": {"scope": "network"}, "deepspeed": {"zero": 2}},
            "deepspeed.zero=2 and parallel.pp=2 with engine=deepspeed",
        ),
        (
            {
                "parallel": {"pp": 2},
                "objective": {"scope": "network"},
                "model": {"widths": [16, 14, 10]},
            },
            "deepspeed.zero=1 and parallel.pp=2 with engine=deepspeed: .* the 3 of",
        ),
        (
            {"parallel": {"tp": 4}, "model": {"widths": [256, 5]}, "deepspeed": {"zero": 3}},
            "parallel.tp=4 with deepspeed.zero=3: of a layer of 5 units",
        ),
        ({"deepspeed": {"zero": 0, "offload": True}}, "deepspeed.zero=1 or more"),
        ({"optimizer": "prox_adam"}, "cut through rows"),
        ({"optimizer": "Adagrad"}, "optimizer.name=Adagrad"),
        ({"optimizer": "LBFGS"}, "optimizer.name=LBFGS"),
        ({"dtype": torch.float64}, "train.dtype=float64"),
        ({"clip": 1.0}, "optimizer.clip=1.0 with engine=deepspeed"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_with_the_reason(change, named):
    with pytest.raises(InputError, match=named):
        _validate(**change)
