"""Counting sort of expert ids: stable, without comparing all ids, without waiting for the device.

Ids are cut into blocks. Within a block every id counts its equals before it; a table of counts by (expert, block), summed
up in that order, then says where each block's first row of each expert goes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetrain.kernels.triton_ops.tiles import INTERPRETED

PAD = -1
"""The expert id of an assignment that goes nowhere."""
BLOCK = 16 if INTERPRETED else 128
"""Ids per program; each is compared with all others of its block."""
WARPS = 1 if INTERPRETED else 8


def sort_by_expert(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """order, counts, place: the ids sorted by expert, ties in their own order, and back.

    expert: [N] int64 in 0..num_experts-1 or -1. order: [N] int64, expert[order] is sorted, with all -1 at its end (the first
    counts.sum() entries are the others). counts: [num_experts] int64, without -1. place: [N] int64, the inverse of order.
    For ids listed token by token, place lists the sorted rows of token 0, then those of token 1, ...
    """
    expert = expert.contiguous()
    num_ids = expert.shape[0]
    order, place = torch.empty_like(expert), torch.empty_like(expert)
    if not num_ids:
        return order, expert.new_zeros(num_experts), place
    blocks = triton.cdiv(num_ids, BLOCK)
    rank = torch.empty(num_ids, dtype=torch.int32, device=expert.device)
    table = torch.zeros(num_experts + 1, blocks, dtype=torch.int32, device=expert.device)  # the last row counts -1
    _rank_in_block[(blocks,)](expert, rank, table, num_ids, num_experts, blocks, BLOCK=BLOCK, num_warps=WARPS)
    ends = table.flatten().cumsum(0)  # int64
    _scatter[(blocks,)](expert, rank, table, ends, order, place, num_ids, num_experts, blocks, BLOCK=BLOCK, num_warps=WARPS)
    return order, table[:num_experts].sum(1), place


@triton.jit
def _load_ids(expert: tl.tensor, index: tl.tensor, num_ids: tl.tensor, num_experts: tl.tensor) -> tl.tensor:
    """Ids as rows of the table: -1 becomes the last row, what lies past the end becomes -1."""
    ids = tl.load(expert + index, mask=index < num_ids, other=0)
    return tl.where(index < num_ids, tl.where(ids < 0, num_experts, ids), -1).to(tl.int32)


@triton.jit
def _rank_in_block(
    expert: tl.tensor,
    rank: tl.tensor,
    table: tl.tensor,
    num_ids: tl.tensor,
    num_experts: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    index = block * BLOCK + tl.arange(0, BLOCK)
    other_index = block * BLOCK + tl.arange(0, BLOCK)
    ids = _load_ids(expert, index, num_ids, num_experts)
    others = _load_ids(expert, other_index, num_ids, num_experts)
    equal = (ids[:, None] == others[None, :]).to(tl.int32)
    before = tl.sum(equal * (other_index[None, :] < index[:, None]).to(tl.int32), 1)
    count = tl.sum(equal, 1)
    tl.store(rank + index, before, mask=index < num_ids)
    # one of the equal ids writes their number
    tl.store(table + ids.to(tl.int64) * blocks + block, count, mask=(index < num_ids) & (before == 0))


@triton.jit
def _scatter(
    expert: tl.tensor,
    rank: tl.tensor,
    table: tl.tensor,
    ends: tl.tensor,
    order: tl.tensor,
    place: tl.tensor,
    num_ids: tl.tensor,
    num_experts: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_ids
    cell = _load_ids(expert, index, num_ids, num_experts).to(tl.int64) * blocks + block
    position = tl.load(ends + cell, mask=inside, other=0) - tl.load(table + cell, mask=inside, other=0)
    position += tl.load(rank + index, mask=inside, other=0)
    tl.store(order + position, index.to(tl.int64), mask=inside)
    tl.store(place + index, position, mask=inside)
