"""The order of training samples as a pure function of (seed, epoch, global sample index).

Each epoch is a keyed permutation of the samples: a Feistel network over the smallest even number of bits that
holds them, walked until it lands inside the range (Black and Rogaway, "Ciphers with arbitrary finite domains",
CT-RSA 2002). It needs no memory and does not depend on a library's random streams, which may change between
versions and would then change the order of a resumed run.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's output function on uint64, elementwise."""
    with np.errstate(over="ignore"):
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * _MIX_1
        x = (x ^ (x >> np.uint64(27))) * _MIX_2
        return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, key: np.ndarray, size: int) -> np.ndarray:
    """Place of each index in a permutation of range(size). index: int64 in [0, size); key: uint64 per index."""
    half = np.uint64(max(1, (max(1, size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    value = index.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right = value[outside] >> half, value[outside] & mask
        for round_number in range(_ROUNDS):
            scrambled = _mix(_mix(key[outside] + np.uint64(round_number)) ^ right)
            left, right = right, left ^ (scrambled & mask)
        value[outside] = (left << half) | right
        outside = value >= np.uint64(size)
    return value.astype(np.int64)


def sample_at(seed: int, index: np.ndarray, num_samples: int) -> np.ndarray:
    """Which of ``num_samples`` samples is at each global sample index. index: [n] int64 >= 0; returns [n] int64.

    Every epoch (``num_samples`` indices in a row) shows each sample once. seed >= 0, num_samples >= 1.
    """
    index = np.asarray(index, dtype=np.int64)
    epoch = (index // num_samples).astype(np.uint64)
    key = _mix(_mix(np.full(index.shape, seed, dtype=np.uint64)) ^ _mix(epoch + _GOLDEN))
    return permute(index % num_samples, key, num_samples)
