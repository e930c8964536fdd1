from __future__ import annotations

import numpy as np
import pytest

from moetrain.data.order import sample_at


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 64, 65, 1000])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_each_epoch_shows_each_sample_once(size: int, epoch: int) -> None:
    shown = sample_at(3, np.arange(epoch * size, (epoch + 1) * size), size)
    assert shown.dtype == np.int64
    assert sorted(shown) == list(range(size))


def test_order_differs_between_epochs_and_seeds() -> None:
    size = 1000
    orders = [sample_at(seed, np.arange(epoch * size, (epoch + 1) * size), size) for seed in (0, 1, 2**40) for epoch in (0, 1, 2)]
    for i, one in enumerate(orders):
        for other in [np.arange(size), *orders[:i]]:
            assert (one == other).mean() < 0.02  # two random permutations agree in one place on average


def test_order_does_not_depend_on_batching() -> None:
    together = sample_at(7, np.arange(500), 123)
    assert [int(sample_at(7, np.array([i]), 123)[0]) for i in range(500)] == together.tolist()
    shuffled = np.random.default_rng(0).permutation(500)
    assert (sample_at(7, shuffled, 123) == together[shuffled]).all()


def test_order_never_changes() -> None:
    """A resumed run must see the same order under any later version of this code and of numpy."""
    assert sample_at(0, np.arange(10), 10).tolist() == ORDER_OF_TEN
    assert sample_at(1, np.array([0, 10**6, 10**12]), 10**9).tolist() == FAR_AWAY


def test_neighbours_are_scattered() -> None:
    shown = sample_at(0, np.arange(10_000), 10_000)
    assert abs(np.corrcoef(shown[:-1], shown[1:])[0, 1]) < 0.05
    assert abs(shown[:1000].mean() - 5000) < 400
    counts = np.zeros((8, 8))  # where each of 8 samples goes over many epochs: about uniform
    for epoch in range(800):
        counts[np.arange(8), sample_at(5, np.arange(epoch * 8, epoch * 8 + 8), 8)] += 1
    assert ((counts - 100) ** 2 / 100).sum() < 100  # chi-square with 49 degrees of freedom


ORDER_OF_TEN = [4, 1, 3, 9, 7, 5, 0, 8, 2, 6]
FAR_AWAY = [709697667, 866377431, 599521434]
