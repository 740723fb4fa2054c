"""The axis over a process group is the axis on one process, value and gradient."""

import os
import time
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dense2conv.bench.timing import peak_bytes
from dense2conv.objectives import gaussian_information, gram
from dense2conv.objectives.gram import symmetric_product
from dense2conv.parallel import ParallelConfig, open_mesh, products
from dense2conv.shapes import Axis
from tests.ranks import on_ranks


def _world():
    return int(os.environ["WORLD_SIZE"])


def _shards():
    """What is wrong with gathered and scattered shards, over all cases."""
    wrong = []
    with open_mesh(ParallelConfig(tp=_world())) as mesh:
        axis = mesh.tp
        factor = sum(range(axis.size + 1))
        for total, dim, by_pieces in product([1, 5, 8], [0, 1], [True, False]):
            axis.sends_pieces = lambda tensor, answer=by_pieces: answer
            whole = torch.arange(total * 3.0, dtype=torch.float64).view(total, 3).movedim(0, dim)
            own = axis.shard(total)
            part = whole.narrow(dim, own.start, len(own)).clone().requires_grad_()
            joined = axis.gather(part, total, dim)
            # Each rank uses the whole with its own factor: gradients of the copies add up.
            (joined * (axis.rank + 1)).sum().backward()
            summed = axis.scatter_sum(whole * (axis.rank + 1), dim)
            pairs = (
                (joined, whole),
                (part.grad, torch.full_like(part, factor)),
                (summed, factor * part),
            )
            if not all(torch.equal(found, right) for found, right in pairs):
                wrong.append((total, dim, by_pieces))
    return wrong


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shards_uneven_and_empty_are_joined_and_summed(world_size):
    assert on_ranks(world_size, _shards) == [[]] * world_size


def _sum_in_16_bits():
    with open_mesh(ParallelConfig(tp=_world())) as mesh:
        own = 256.0 if mesh.tp.rank == 0 else 1.0
        return mesh.tp.scatter_sum(torch.full((4,), own, dtype=torch.bfloat16)).tolist()


def test_a_sum_of_pieces_in_16_bits_is_rounded_once():
    # Of 256 + 1 + 1 + 1; 257 would be rounded to 256 again and again.
    assert on_ranks(4, _sum_in_16_bits) == [[260.0]] * 4


PRODUCTS = [  # rows, inputs, units, precision, bias, and whether the inputs' gradient is asked for
    (6, 8, 12, torch.float64, True, True),
    (7, 5, 9, torch.float64, False, True),  # on four ranks the last one holds nothing
    (1, 1, 1, torch.float64, True, True),
    (7, 9, 12, torch.float64, False, False),
    (40, 8, 5, torch.float32, False, True),
    (0, 8, 12, torch.float32, True, True),
    (7, 8, 12, torch.bfloat16, True, True),
]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def _draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _own(axis, whole, dim):
    own = axis.shard(whole.shape[dim])
    return whole.narrow(dim, own.start, len(own)).clone()


def _product_errors(axis, m, num_inputs, num_units, dtype, with_bias, with_input_gradient):
    """Of a product with spread columns and of its gradients, against one process in fp64."""
    x, weight = _draw(m, num_inputs, seed=0).to(dtype), _draw(num_units, num_inputs, seed=1)
    whole = [weight.to(dtype)] + ([_draw(num_units, seed=2).to(dtype)] if with_bias else [])
    shard = _own(axis, x, 1).requires_grad_(with_input_gradient)
    held = [_own(axis, t, 0).requires_grad_() for t in whole]
    output = axis.linear(shard, *held, *([] if with_bias else [None]), num_units)
    output.square().sum().backward()
    x = x.double().requires_grad_()
    whole = [t.double().requires_grad_() for t in whole]
    slow = F.linear(x, *whole)
    slow.square().sum().backward()
    pairs = [(output, _own(axis, slow.detach(), 1))]
    pairs += [(a.grad, _own(axis, b.grad, 0)) for a, b in zip(held, whole, strict=True)]
    if with_input_gradient:
        pairs.append((shard.grad, _own(axis, x.grad, 1)))
    assert (shard.grad is not None) == with_input_gradient
    return [float((a.double() - b).norm() / (1 + b.norm())) for a, b in pairs]


def _products():
    """The largest error of every product whose tolerance it exceeds."""
    products._MIN_CHUNK_ROWS = 2  # seven rows: three, three and one
    wrong = {}
    with open_mesh(ParallelConfig(tp=_world())) as mesh:
        for case, by_pieces, exchanged in product(PRODUCTS, [True, False], [True, False]):
            mesh.tp.sends_pieces = lambda tensor, answer=by_pieces: answer
            products.weights_travel = lambda *sizes, answer=exchanged: answer
            error = max(_product_errors(mesh.tp, *case))
            if not error < TOLERANCE[case[3]]:
                wrong[case, by_pieces, exchanged] = error
    return wrong


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_product_with_spread_columns_is_that_with_the_whole(world_size):
    assert on_ranks(world_size, _products) == [{}] * world_size


def _late(by_pieces, exchanged):
    """Whether a product and its gradients are the same bits when a rank comes late to each chunk."""
    products._MIN_CHUNK_ROWS = 2
    products.weights_travel = lambda *sizes: exchanged
    found = []
    with open_mesh(ParallelConfig(tp=_world())) as mesh:
        axis = mesh.tp
        axis.sends_pieces = lambda tensor: by_pieces
        lengths = axis.lengths
        for late in (None, 0, 1):

            def lengths_in_a_while(total, late=late):
                if axis.rank == late:
                    time.sleep(0.02)
                return lengths(total)

            axis.lengths = lengths_in_a_while  # which every chunk begins with
            shard = _draw(7, 3, seed=axis.rank).requires_grad_()
            weight = _draw(4, 3 * axis.size, seed=9 + axis.rank).requires_grad_()
            output = axis.linear(shard, weight, None, 4 * axis.size)
            output.square().sum().backward()
            found.append(torch.cat([t.flatten() for t in (output, shard.grad, weight.grad)]))
    return all(torch.equal(found[0], each) for each in found)


@pytest.mark.parametrize("by_pieces", [True, False])
@pytest.mark.parametrize("exchanged", [True, False])
def test_the_result_does_not_depend_on_who_is_late(by_pieces, exchanged):
    assert all(on_ranks(4, _late, by_pieces, exchanged))


aten = torch.ops.aten


class _Products(TorchDispatchMode):
    """Notes every matrix product in ``log``."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (aten.mm, aten.addmm, aten.addmm_):
            self.log.append("product")
        return function(*args, **(kwargs or {}))


def _noted(begin, log):
    """``begin``, noting when it is called, and when its result is."""

    def noted(*arguments):
        log.append("begin")
        finish = begin(*arguments)

        def noted_finish():
            log.append("wait")
            return finish()

        return noted_finish

    return noted


def _order(by_pieces, exchanged, *begin):
    """What is done forward and backward, in a word a thing, of methods of the axis and products."""
    products._MIN_CHUNK_ROWS = 2  # seven rows: three, three and one, or four and three
    products.weights_travel = lambda *sizes: exchanged
    log = []
    with open_mesh(ParallelConfig(tp=_world())) as mesh, _Products(log):
        mesh.tp.sends_pieces = lambda tensor: by_pieces
        for name in begin:
            setattr(mesh.tp, name, _noted(getattr(mesh.tp, name), log))
        shard, weight = _draw(7, 3, seed=0), _draw(4, 6, seed=1)
        output = mesh.tp.linear(shard.requires_grad_(), weight.requires_grad_(), None, 8)
        log.append("|")
        output.sum().backward()
    return " ".join(log)


def _sides(*arguments):
    """The order of things forward, and backward."""
    (order,) = set(on_ranks(2, _order, *arguments))
    return [side.strip() for side in order.split("|")]


def test_chunks_travel_while_others_are_multiplied():
    forward, backward = _sides(False, False, "begin_gather", "begin_scatter_sum")
    assert forward == "begin begin wait product begin wait product wait product"
    # The last product, while the last chunk's sum is under way, makes the weights' gradient.
    assert backward == "product begin product begin wait product begin wait product wait"


def test_pieces_travel_while_others_are_multiplied():
    forward, _ = _sides(True, False, "receive")
    assert forward == "begin product wait product"
    # Of each half the other one's product, then own onto what has come; between, the weights' two.
    _, backward = _sides(True, False, "begin_sum_of_others")
    assert backward == "product begin product begin wait product product product wait product"


def test_outputs_travel_in_chunks_where_weights_do():
    forward, backward = _sides(False, True, "begin_exchange", "begin_scatter_sum", "begin_gather")
    exchange, outputs = "begin wait ", "product begin product begin wait product begin wait wait"
    assert forward == exchange + outputs
    gathered = "begin begin wait product begin wait product wait product "
    assert backward == gathered + "product begin product wait"  # the last one is of own weights


def test_outputs_travel_in_pieces_where_weights_do():
    forward, backward = _sides(True, True, "begin_exchange", "begin_sum_of_others")
    exchange, outputs = "begin wait ", "product begin product begin wait product wait product"
    assert forward == exchange + outputs
    assert backward == "product product product begin product wait"


@pytest.mark.parametrize("shape", [(2048, 4096, 1024), (256, 4096, 1024), (512, 512, 512)])
def test_weights_travel_where_that_is_less(shape):
    m, num_inputs, num_units = shape
    size = 2
    inputs = 2 * m * num_inputs  # forward, and the sum of their gradients backward
    outputs, weights = 2 * m * num_units, 2 * num_units * num_inputs / size
    assert products.weights_travel(*shape, size) == (outputs + weights < inputs)


def _peak():
    with open_mesh(ParallelConfig(tp=_world())) as mesh:
        axis = mesh.tp
        shard = _draw(2048, 256, seed=0).requires_grad_()
        weight = _draw(32, 512, seed=1).requires_grad_()

        def work():
            torch.autograd.grad(axis.linear(shard, weight).sum(), (shard, weight))

        work()
        return peak_bytes(work, mesh.device) / shard.nbytes


def test_a_product_holds_its_input_its_gradient_and_little_that_travels():
    # Of the shard's size: the other rank's 1, the gradient 1, and two halves on their way 1.
    assert max(on_ranks(2, _peak)) < 3.1


def _panel_order():
    log = []
    axis = Axis()
    axis.begin_sum = _noted(axis.begin_sum, log)
    with _Products(log):
        symmetric_product(torch.randn(300, 5), axis)
    return log


def test_panels_of_a_gram_matrix_travel_while_others_are_multiplied():
    assert _panel_order() == "product begin product begin product begin wait wait wait".split()


def _rate(sizes, shape):
    gram._PANEL = 2  # sides above four go by panels
    dp, tp = sizes
    m, d = shape
    z = torch.randn(m, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with open_mesh(ParallelConfig(dp=dp, tp=tp)) as mesh:
        rows, columns = mesh.dp.shard(m), mesh.tp.shard(d)
        own = z[rows.start : rows.stop, columns.start : columns.stop].clone().requires_grad_()
        value = gaussian_information(own, 0.1, mesh.layout, m)
        value.backward()
        whole = z.clone().requires_grad_()
        expected = gaussian_information(whole, 0.1)
        expected.backward()
        slow = whole.grad[rows.start : rows.stop, columns.start : columns.stop]
        return float(value - expected), float((own.grad - slow).norm())  # a shard may be empty


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1)])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8), (4, 4)])
def test_the_rate_and_its_gradient_are_those_of_the_whole_batch(sizes, shape):
    for value_error, gradient_error in on_ranks(sizes[0] * sizes[1], _rate, sizes, shape):
        assert abs(value_error) < 1e-12
        assert gradient_error < 1e-12
