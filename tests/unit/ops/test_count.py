"""count against a loop, by both ways of counting."""

import pytest
import torch

from moetrain.ops import count as module
from moetrain.ops.count import count


@pytest.mark.parametrize("way", ["_by_bincount", "_by_scatter"])
@pytest.mark.parametrize("index", [[], [-1, -1], [0, 3, 3, -1, 1], [2] * 9], ids=str)
@pytest.mark.parametrize("size", [4, 7])
def test_equals_a_loop(index, size, way, monkeypatch):
    monkeypatch.setattr(module, "_by_bincount", getattr(module, way))
    counted = count(torch.tensor(index, dtype=torch.int64), size)
    assert counted.dtype == torch.int64 and counted.tolist() == [index.count(i) for i in range(size)]
