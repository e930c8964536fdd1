"""Moving rows between token order and expert order, with written-out backwards.

Both directions are gathers or segment sums over whole rows: the backward of a gather is a sum per token, which
``embedding_bag`` does several times faster on CPU than ``index_add``, and in float32 inside for narrower rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moetrain.ops.backend import triton_kernels
from moetrain.ops.count import count


@dataclass(frozen=True)
class Rows:
    """N rows, each of which belongs to one of T tokens: the token of each row, and the rows of each token.

    token: [N] int64. place: [N] int64, the rows of token 0, then those of token 1, and so on. bounds: [T + 1] int64, where
    each token's run in ``place`` begins and the last one ends; None if every token has N / T rows.
    """

    token: Tensor
    place: Tensor
    bounds: Tensor | None
    num_tokens: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """All but the number of tokens, for ``save_for_backward``: what hangs on a context is not dropped by recomputation."""
        return self.token, self.place, self.bounds

    @staticmethod
    def of(token: Tensor, num_tokens: int) -> Rows:
        """Any number of rows per token, also none."""
        place = token.to(torch.int32).argsort(stable=True)
        bounds = torch.zeros(num_tokens + 1, dtype=torch.int64, device=token.device)
        torch.cumsum(count(token, num_tokens), 0, out=bounds[1:])
        return Rows(token, place, bounds, num_tokens)

    def reordered(self, order: Tensor) -> Rows:
        """The same rows with row order[n] in place n. order: [N] int64, a permutation."""
        return replace(self, token=self.token[order], place=inverse_permutation(order)[self.place])


def inverse_permutation(order: Tensor) -> Tensor:
    """inverse[order[n]] = n. order: [N] int64."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


def gather_rows(x: Tensor, rows: Rows) -> Tensor:
    """x[rows.token]. x: [T, D]; returns [N, D]."""
    return _GatherRows.apply(x, rows)


def combine_rows(y: Tensor, weight: Tensor | None, rows: Rows) -> Tensor:
    """Weighted sum of the rows of each token: out[t] = sum over n with token[n] = t of weight[n] * y[n].

    y: [N, D]; weight: [N] at least float32, None for ones. The sum is made in at least float32. Returns [T, D] in y's dtype.
    """
    return _CombineRows.apply(y, weight, rows)


def sum_rows(y: Tensor, rows: Rows, weight: Tensor | None = None) -> Tensor:
    """The weighted sum of the rows of each token, [N, D] -> [T, D]; without gradient. Made in at least float32.

    weight: [N] at least float32, None for ones.
    """
    kernels = triton_kernels("segment_sum", y)
    if kernels is not None:
        return kernels.segment_sum(y, rows.num_tokens, place=rows.place, bounds=rows.bounds, weight=weight)
    if not y.numel():
        return y.new_zeros(rows.num_tokens, y.shape[1])
    bags = rows.place.view(rows.num_tokens, -1) if rows.bounds is None else rows.place
    bag = partial(F.embedding_bag, bags, y, rows.bounds, mode="sum", include_last_offset=rows.bounds is not None)
    if weight is None:
        return bag()
    factor = weight[rows.place].view_as(bags)
    rounded = factor.to(y.dtype)
    total = bag(per_sample_weights=rounded)
    if y.dtype != weight.dtype:  # what rounding to the rows' dtype, which embedding_bag wants, leaves of the weights
        total += bag(per_sample_weights=(factor - rounded).to(y.dtype))
    return total


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*rows.tensors())
        ctx.num_tokens = rows.num_tokens
        return x.index_select(0, rows.token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        token, place, bounds = ctx.saved_tensors
        return sum_rows(grad.contiguous(), Rows(token, place, bounds, ctx.num_tokens)), None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor | None, rows: Rows) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(None if weight is None else y, weight, rows.token)
        return sum_rows(y, rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        y, weight, token = ctx.saved_tensors  # once: activation checkpointing refuses a second time
        kernels = None if weight is None else triton_kernels("segment_sum", y)
        if kernels is not None:
            return *kernels.combine_backward(grad, y, token, weight), None
        rows = grad.index_select(0, token)
        if weight is None:
            return rows, None, None
        grad_weight = (rows.to(weight.dtype) * y).sum(dim=1)
        return rows.mul_(weight.to(rows.dtype)[:, None]), grad_weight, None
