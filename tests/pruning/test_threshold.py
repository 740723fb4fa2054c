"""Radix selection against a stable sort of everything, on 1, 2 and 4 ranks."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dense2conv.parallel import ParallelConfig, open_mesh
from dense2conv.pruning import PruneConfig, magnitude_mask, threshold
from dense2conv.shapes import Axis, InputError
from tests import oracles
from tests.ranks import on_ranks


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=40),
    more=st.lists(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1e-42]), min_size=1, max_size=20),
    share=st.floats(0, 1.2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_a_stable_sort_with_ties_zeros_and_subnormals(values, more, share, dtype):
    tensors = [torch.tensor([values], dtype=dtype), torch.tensor([more], dtype=dtype)]
    num_kept = round(share * (len(values) + len(more)))
    masks = magnitude_mask(tensors, num_kept, Axis())
    for mask, oracle in zip(masks, oracles.largest_magnitudes(tensors, num_kept), strict=True):
        assert torch.equal(mask, oracle)


@pytest.mark.parametrize("piece", [1, 6, 14, 126])
def test_weights_are_looked_at_a_piece_after_the_other(piece, monkeypatch):
    monkeypatch.setattr(threshold, "_PIECE", piece)
    tensors = _weights(torch.float32)
    for num_kept in (1, 40, 100, 155):
        masks = magnitude_mask(tensors, num_kept, Axis())
        for mask, oracle in zip(masks, oracles.largest_magnitudes(tensors, num_kept), strict=True):
            assert torch.equal(mask, oracle)


def _weights(dtype):
    generator = torch.Generator().manual_seed(3)
    # Rounded, so that there are many ties; 9 and 5 rows, so that shards are uneven, or empty.
    return [
        torch.randn(9, 14, generator=generator, dtype=dtype).round(decimals=1),
        torch.randn(5, 6, generator=generator, dtype=dtype).round(decimals=1),
    ]


def _masks(counts, dtype):
    with open_mesh(ParallelConfig(tp=int(os.environ["WORLD_SIZE"]))) as mesh:
        whole = _weights(dtype)
        own = [w[mesh.tp.shard(len(w)).start : mesh.tp.shard(len(w)).stop] for w in whole]
        return [
            [
                mesh.tp.gather(m.to(torch.int64), len(w)).bool()
                for m, w in zip(masks, whole, strict=True)
            ]
            for masks in (magnitude_mask(own, count, mesh.tp) for count in counts)
        ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shards_give_the_mask_of_the_gathered_tensor_bit_for_bit(world_size, dtype):
    counts = [0, 1, 40, 100, 155, 156, 1000]
    for rank in on_ranks(world_size, _masks, counts, dtype):
        for masks, count in zip(rank, counts, strict=True):
            for mask, oracle in zip(
                masks, oracles.largest_magnitudes(_weights(dtype), count), strict=True
            ):
                assert torch.equal(mask, oracle)


def test_no_tensors_and_bad_shares():
    assert magnitude_mask([], 3, Axis()) == []
    with pytest.raises(InputError, match=r"prune.sparsity=1.0"):
        PruneConfig(sparsity=1.0).validate()
