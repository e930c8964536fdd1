"""Sorting the entries of a routing by expert, stably."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.ops.backend import triton_kernels
from moetrain.ops.count import count
from moetrain.ops.permute import inverse_permutation


def sort_by_expert(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """order, counts, place: entries in the order of their experts, entries of each expert, and the inverse of ``order``.

    expert: [N] int64 in 0..num_experts-1, or -1. order, place: [N] int64; equal ids keep their order, entries of -1 come last.
    counts: [num_experts] int64, without these.
    """
    kernels = triton_kernels("sort_experts", expert)
    if kernels is not None:
        return kernels.sort_by_expert(expert, num_experts)
    counts = count(expert, num_experts)
    narrow = torch.uint8 if num_experts < 256 else torch.int16 if num_experts < 32768 else torch.int32
    if narrow != torch.uint8:  # in which -1 is 255
        expert = torch.where(expert < 0, num_experts, expert)
    order = expert.to(narrow).argsort(stable=True)
    return order, counts, inverse_permutation(order)
