"""Moving rows between token order and expert order, with written-out backwards.

Both directions are gathers or segment sums over whole rows: the backward of a gather by ``index`` is a sum per
token, which ``embedding_bag`` does several times faster on CPU than ``index_add``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def gather_rows(x: Tensor, token: Tensor, place_TK: Tensor | None) -> Tensor:
    """x[token]. x: [T, D]; token: [N] int64; returns [N, D].

    place_TK: [T, K] int64, the K rows of the result that are copies of each token, if every token has K; it
    makes the backward a dense sum.
    """
    return _GatherRows.apply(x, token, place_TK)


def combine_rows(y: Tensor, weight: Tensor, token: Tensor, num_tokens: int, place_TK: Tensor | None) -> Tensor:
    """Weighted sum of the rows of each token: out[t] = sum over n with token[n] = t of weight[n] * y[n].

    y: [N, D]; weight: [N] at least float32; token, place_TK: as for :func:`gather_rows`. The products and the sum
    have the weights' dtype; returns [T, D] in it.
    """
    return _CombineRows.apply(y.to(weight.dtype), weight, token, num_tokens, place_TK)


def _sum_rows(y: Tensor, token: Tensor, num_tokens: int, place_TK: Tensor | None, weight: Tensor | None = None) -> Tensor:
    if place_TK is not None and y.dtype in (torch.float32, torch.float64, torch.bfloat16):
        scale = None if weight is None else weight[place_TK]
        return F.embedding_bag(place_TK, y, per_sample_weights=scale, mode="sum")
    rows = y if weight is None else y * weight[:, None]
    return torch.zeros(num_tokens, y.shape[1], dtype=y.dtype, device=y.device).index_add_(0, token, rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place_TK: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(token, place_TK)
        ctx.num_tokens = x.shape[0]
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        token, place_TK = ctx.saved_tensors
        return _sum_rows(grad.contiguous(), token, ctx.num_tokens, place_TK), None, None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, token: Tensor, num_tokens: int, place_TK: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(y, weight, token)
        return _sum_rows(y, token, num_tokens, place_TK, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        y, weight, token = ctx.saved_tensors
        rows = grad.index_select(0, token)
        grad_weight = torch.linalg.vecdot(rows, y)
        return rows.mul_(weight[:, None]), grad_weight, None, None, None
