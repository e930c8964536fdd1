"""Counting small integers without asking the device for its results.

``bincount`` finds the largest entry first, which on CUDA makes the host wait for everything queued before.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count(index: Tensor, size: int) -> Tensor:
    """How often each of 0 .. size - 1 occurs, [size] int64; entries of -1 are not counted. index: [N] int64."""
    counted = _by_bincount if index.device.type == "cpu" else _by_scatter
    return counted(index + 1, size + 1)[1:]


def _by_bincount(index: Tensor, size: int) -> Tensor:
    return torch.bincount(index, minlength=size)


def _by_scatter(index: Tensor, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int64, device=index.device).scatter_add_(0, index, torch.ones_like(index))
