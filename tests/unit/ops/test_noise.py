"""Counter-based noise: a pure function of its coordinates, and uniform."""

from __future__ import annotations

import pytest
import torch

from moetrain.ops import noise


def splitmix64(state: int) -> int:
    """The published generator's output for a state, in Python integers."""
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@pytest.mark.parametrize("state", [0, 1, 12345, (1 << 63) - 1, -1, -(1 << 63)])
def test_mix_is_splitmix64(state: int) -> None:
    expected = splitmix64(state & ((1 << 64) - 1))
    assert int(noise.mix(torch.tensor([state]))) & ((1 << 64) - 1) == expected


def test_the_published_first_output_for_seed_zero() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_uniform_in_the_half_open_unit_interval(dtype: torch.dtype) -> None:
    values = noise.uniform(torch.arange(2000), 50, dtype)
    assert values.dtype == dtype and values.shape == (2000, 50)
    assert float(values.min()) >= 0 and float(values.max()) < 1
    assert abs(float(values.mean()) - 0.5) < 0.005
    counts = torch.histc(values.float(), bins=20, min=0, max=1)
    assert float((counts - 5000).abs().max()) < 400  # 5.8 standard deviations
    assert abs(float(torch.corrcoef(values[:, :2].T.double())[0, 1])) < 0.1


def test_a_row_depends_on_its_key_alone() -> None:
    keys = torch.tensor([3, 99, -7])
    whole = noise.uniform(keys, 8)
    assert torch.equal(whole[[1]], noise.uniform(keys[1:2], 8))
    assert torch.equal(whole[:, :3], noise.uniform(keys, 3))


def test_texts_hash_the_same_in_every_process() -> None:
    assert noise.hash_text("0/layers.3.ffn") == 6578260876750703462
    assert noise.hash_text("a") != noise.hash_text("b")
    assert all(0 <= noise.hash_text(str(i)) < 1 << 63 and noise.hash_text(str(i), bits=32) < 1 << 32 for i in range(100))


@pytest.mark.parametrize(("transform", "mean", "variance"), [(noise.normal, 0.0, 1.0), (noise.gumbel, 0.5772156649, torch.pi**2 / 6)])
def test_transformed_draws_have_the_moments_of_their_distribution(transform, mean: float, variance: float) -> None:
    values = transform(noise.uniform(torch.arange(20_000), 10, torch.float64))
    assert abs(float(values.mean()) - mean) < 0.015 and abs(float(values.var()) - variance) < 0.05
    assert bool(transform(torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)).isfinite().all())
