"""Combine: the rows of each token, summed in float32 in a fixed order, and its backward. No atomics, so the same bits every time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetrain.kernels.triton_ops.tiles import INTERPRETED

LARGEST_BLOCK = 16 if INTERPRETED else 2048
"""Columns per program: 16 bytes per thread and row of bfloat16 with 8 warps."""


def segment_sum(rows: Tensor, num_tokens: int, *, place: Tensor, bounds: Tensor | None, weight: Tensor | None = None) -> Tensor:
    """out[t] = sum over j of weight[place[j]] * rows[place[j]], j from bounds[t] to bounds[t + 1].

    rows: [N, D]; place: [N] int64; bounds: [T+1] int64, None if every token has N / T rows; weight: [N] float32, None is 1.
    Returns [T, D] in rows' dtype; zeros for tokens without rows.
    """
    rows, place = rows.contiguous(), place.contiguous()
    bounds, weight = (None if t is None else t.contiguous() for t in (bounds, weight))
    width = rows.shape[1]
    out = rows.new_empty(num_tokens, width)
    if not out.numel():
        return out
    block = min(triton.next_power_of_2(width), LARGEST_BLOCK)
    per_token = 0 if bounds is not None else place.numel() // num_tokens
    _segment_sum[(num_tokens, triton.cdiv(width, block))](
        rows, place, bounds, weight, out, width, PER_TOKEN=per_token, RAGGED=bounds is not None, WEIGHTED=weight is not None, BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return out


def combine_backward(grad: Tensor, y: Tensor, token: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of a weighted sum: grad_y[n] = weight[n] * grad[token[n]], and the weights' gradients <grad[token[n]], y[n]>, in one pass.

    grad: [T, D]; y: [N, D] in the same dtype; token: [N] int64; weight: [N] float32. Returns [N, D] in that dtype, [N] float32.
    """
    grad, y, token, weight = grad.contiguous(), y.contiguous(), token.contiguous(), weight.contiguous()
    grad_y, grad_weight = torch.empty_like(y), torch.empty_like(weight)
    if not y.numel():
        return grad_y, grad_weight.zero_()
    block = min(triton.next_power_of_2(y.shape[1]), LARGEST_BLOCK)
    _combine_backward[(y.shape[0],)](grad, y, token, weight, grad_y, grad_weight, y.shape[1], BLOCK=block, num_warps=_warps(block))
    return grad_y, grad_weight


def _warps(block: int) -> int:
    return 1 if INTERPRETED else 8 if block >= 2048 else 4


@triton.jit
def _segment_sum(
    rows: tl.tensor,
    place: tl.tensor,
    bounds: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    PER_TOKEN: tl.constexpr,
    RAGGED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if RAGGED:
        for j in range(tl.load(bounds + token), tl.load(bounds + token + 1)):
            total += _scaled_row(rows, tl.load(place + j), weight, column, width, WEIGHTED)
    else:
        for k in tl.static_range(PER_TOKEN):  # unrolled: the loads do not wait for one another
            total += _scaled_row(rows, tl.load(place + token * PER_TOKEN + k), weight, column, width, WEIGHTED)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=column < width)


@triton.jit
def _scaled_row(
    rows: tl.tensor, row: tl.tensor, weight: tl.tensor, column: tl.tensor, width: tl.tensor, WEIGHTED: tl.constexpr
) -> tl.tensor:
    values = tl.load(rows + row * width + column, mask=column < width, other=0.0).to(tl.float32)
    if WEIGHTED:
        values *= tl.load(weight + row)
    return values


@triton.jit
def _combine_backward(
    grad: tl.tensor,
    y: tl.tensor,
    token: tl.tensor,
    weight: tl.tensor,
    grad_y: tl.tensor,
    grad_weight: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    source, factor = tl.load(token + row), tl.load(weight + row)
    dot = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        reaching = tl.load(grad + source * width + column, mask=column < width, other=0.0).to(tl.float32)
        dot += reaching * tl.load(y + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        tl.store(grad_y + row * width + column, (reaching * factor).to(grad_y.dtype.element_ty), mask=column < width)
    tl.store(grad_weight + row, tl.sum(dot, 0))
