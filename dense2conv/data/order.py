"""Which image, and which part of it: pure functions of (seed, counter), so a run restarts anywhere.

Sample ``c`` of a run is image ``c mod N`` of the permutation that epoch ``c // N`` has.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 8
_ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


def shuffled(counters: np.ndarray, num_images: int, *name: int) -> np.ndarray:
    """The image of each sample of a run: every epoch visits every image once, in an order of its own.

    Args:
        counters: (n,) int64, samples since the run began.
        num_images: N.
        name: the stream, such as (seed, IMAGES).

    Returns:
        (n,) int64 in [0, N).
    """
    epochs, positions = np.divmod(counters, num_images)
    images = np.empty_like(positions)
    for epoch in np.unique(epochs):
        own = epochs == epoch
        images[own] = permuted(positions[own], num_images, *name, int(epoch))
    return images


def permuted(positions: np.ndarray, length: int, *name: int) -> np.ndarray:
    """Where ``positions`` (n,) go in one permutation of range(length); no table is made.

    A Feistel network permutes the smallest 4ᵏ numbers that are enough; one that lands outside walks on
    along its cycle until it is inside. (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002)
    """
    half = np.uint64(max(1, (int(length - 1).bit_length() + 1) // 2))
    keys = np.random.SeedSequence(name).generate_state(_ROUNDS, np.uint64)
    out = positions.astype(np.uint64)
    outside = np.arange(len(out))
    while len(outside):
        out[outside] = _feistel(out[outside], half, keys)
        outside = outside[out[outside] >= length]
    return out.astype(np.int64)


def uniform(counters: np.ndarray, num: int, *name: int) -> np.ndarray:
    """``num`` numbers in [0, 1) of each sample: (n, num) float64, a function of (name, counter)."""
    keys = np.random.SeedSequence(name).generate_state(num, np.uint64)
    bits = _mixed(_mixed(counters.astype(np.uint64))[:, None] ^ keys)  # (n, num)
    return (bits >> np.uint64(11)) * 2.0**-53


def _feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = _ONES >> (np.uint64(64) - half)
    left, right = values >> half, values & mask
    for i in range(len(keys)):
        left, right = right, left ^ (_mixed(right ^ keys[i : i + 1]) & mask)
    return (left << half) | right


def _mixed(bits: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: each bit depends on all. (Steele, Lea and Flood, 2014)"""
    bits = bits + np.uint64(0x9E37_79B9_7F4A_7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return bits ^ (bits >> np.uint64(31))
