"""Sorting by expert: stable, entries of -1 last, with counts and the way back, for any number of experts."""

from __future__ import annotations

import pytest
import torch

from moetrain.ops.sort import sort_by_expert


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("num_experts", [1, 7, 254, 255, 256, 257, 300, 40000])
def test_sorted(num_experts: int, pads: bool) -> None:
    expert = torch.randint(-1 if pads else 0, num_experts, (500,), generator=torch.Generator().manual_seed(0))
    expert[3] = num_experts - 1
    order, counts, place = sort_by_expert(expert, num_experts)
    expected = sorted(range(500), key=lambda n: (expert[n] < 0, int(expert[n]), n))
    assert order.tolist() == expected
    assert torch.equal(place[order], torch.arange(500))
    assert torch.equal(counts, torch.bincount(expert[expert >= 0], minlength=num_experts))


def test_nothing_to_sort() -> None:
    order, counts, place = sort_by_expert(torch.empty(0, dtype=torch.int64), 3)
    assert order.numel() == place.numel() == 0 and counts.tolist() == [0, 0, 0]
