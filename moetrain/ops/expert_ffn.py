"""The block of feed-forward experts as one operation: gather, w_in, activation, w_out, weighted sum by token.

Backward keeps neither the gathered inputs nor the experts' outputs (after SonicMoE, 2512.14080): inputs are gathered again,
and the gradient of a combine weight is the product of the hidden units with the gradient that reaches them,
d weight[n] = <w_out^T dy[token[n]], a[n]>, as the output is linear in both. Kept besides x and the weights: h, and per row
its weight and indices, :func:`saved_bytes_per_row`.

Backends: on CUDA the Triton kernels; on CPU one plain product after the other. :func:`reference` is their slow twin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.ops.activations import ACTIVATIONS, Activation, hidden_activation
from moetrain.ops.backend import triton_kernels
from moetrain.ops.grouped_linear import grouped_linear
from moetrain.ops.permute import Rows, combine_rows, gather_rows, sum_rows
from moetrain.ops.product import product

LONGEST_RUN = 1024
"""Rows of one expert that the CPU takes at a time: a busy expert shall not need more memory in between than all others."""


@dataclass(frozen=True)
class Block:
    """What is no tensor with a gradient. counts: [e] int64 rows per expert, in their order. rows: as for
    :func:`expert_ffn`."""

    counts: Tensor
    rows: Rows | None
    activation: Activation
    gated: bool

    def for_kernels(self) -> dict[str, Any]:
        """As arguments of the Triton kernels."""
        rows = self.rows
        indices = {name: None if rows is None else getattr(rows, name) for name in ("token", "place", "bounds")}
        return {**indices, "activation": self.activation, "gated": self.gated}


def expert_ffn(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    counts: Tensor,
    *,
    rows: Rows | None = None,
    weight: Tensor | None = None,
    activation: Activation,
    gated: bool,
) -> Tensor:
    """Rows sorted by expert through their experts; with ``rows`` they are gathered from tokens and summed by token.

    x: [T, D] tokens, or [N, D] rows in order without ``rows``. w_in: [e, 2F (gate above up) or F, D]; w_out: [e, D', F]; in
    x's dtype, or wider: then they are rounded to it for the products. counts: [e] int64 rows per expert, N in all.
    weight: [N] factor of each row's output in the sums of ``rows``, at least float32. Returns [T, D'] or [N, D'] in x's dtype.
    """
    assert weight is None or rows is not None, "weights are those of a sum by token"
    block = Block(counts, rows, activation, gated)
    if x.device.type != "cpu" and triton_kernels("expert_ffn", x) is None:
        return reference(x, w_in, w_out, weight, block)
    return _ExpertFFN.apply(x, w_in, w_out, weight, block)


def reference(x: Tensor, w_in: Tensor, w_out: Tensor, weight: Tensor | None, block: Block) -> Tensor:
    """The same by autograd through separate operations."""
    inputs = x if block.rows is None else gather_rows(x, block.rows)
    hidden = hidden_activation(grouped_linear(inputs, w_in.to(x.dtype), block.counts), block.activation, gated=block.gated)
    y = grouped_linear(hidden, w_out.to(x.dtype), block.counts)
    return y if block.rows is None else combine_rows(y, weight, block.rows)


def saved_bytes_per_row(width: int, dtype: torch.dtype, *, gated: bool) -> int:
    """What one row (one choice of one token) leaves in memory between forward and backward: its hidden units before the
    activation, its weight in float32 (8 bytes in float64), its token and its place (8 bytes each)."""
    return width * (2 if gated else 1) * dtype.itemsize + max(4, dtype.itemsize) + 16


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_in: Tensor, w_out: Tensor, weight: Tensor | None, block: Block) -> Tensor:  # type: ignore[override]
        kernels = triton_kernels("expert_ffn", x)
        if kernels is None:
            y, h = _forward(x, w_in, w_out, weight, block)
        else:
            y, h = kernels.forward(x, w_in.to(x.dtype), w_out.to(x.dtype), block.counts, weight=weight, **block.for_kernels())
        indices = () if block.rows is None else block.rows.tensors()
        ctx.save_for_backward(x, h, w_in, w_out, weight, block.counts, *indices)
        ctx.settings = (block.activation, block.gated)
        ctx.num_tokens = block.rows and block.rows.num_tokens
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, h, w_in, w_out, weight, counts, *indices = ctx.saved_tensors
        block = Block(counts, Rows(indices[0], indices[1], indices[2], ctx.num_tokens) if indices else None, *ctx.settings)
        kernels = triton_kernels("expert_ffn", x)
        if kernels is None:
            return *_backward(grad, x, h, w_in, w_out, weight, block, ctx.needs_input_grad[:4]), None
        low = (w_in.to(x.dtype), w_out.to(x.dtype))
        needs = ctx.needs_input_grad[:3]
        gradients = kernels.backward(grad, x, h, *low, block.counts, weight=weight, needs=needs, **block.for_kernels())
        grad_x, grad_in, grad_out, grad_weight = gradients
        grad_in, grad_out = (None if g is None else g.to(w.dtype) for g, w in ((grad_in, w_in), (grad_out, w_out)))
        return grad_x, grad_in, grad_out, grad_weight, None


def _forward(x: Tensor, w_in: Tensor, w_out: Tensor, weight: Tensor | None, block: Block) -> tuple[Tensor, Tensor]:
    """The output and h. One product per expert: its rows stay in the cache between the steps, in memory used again."""
    counts, rows = block.counts.tolist(), block.rows
    h, y = x.new_empty(sum(counts), w_in.shape[1]), x.new_empty(sum(counts), w_out.shape[1])
    scratch = _scratch(x, counts, x.shape[1], w_out.shape[2])
    act = ACTIVATIONS[block.activation]
    for expert, run, _, _ in _runs(counts):
        gathered, a = (t[: run.stop - run.start] for t in scratch)
        product(_take(x, rows, run, gathered), w_in[expert].to(x.dtype).t(), out=h[run])
        gate, *up = h[run].chunk(2 if block.gated else 1, dim=1)
        act.forward_into(gate, a)
        if up:
            a.mul_(up[0])
        product(a, w_out[expert].to(x.dtype).t(), out=y[run])
    return (y if rows is None else sum_rows(y, rows, weight)), h


def _backward(
    grad: Tensor, x: Tensor, h: Tensor, w_in: Tensor, w_out: Tensor, weight: Tensor | None, block: Block, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_in, w_out and weight, as far as they are needed. Weights are rounded to the dtype of what they scale."""
    counts, rows = block.counts.tolist(), block.rows
    grad_x = x.new_empty(h.shape[0], x.shape[1]) if needs[0] else None
    grad_in, grad_out = (_zero_where_empty(w, counts) if need else None for w, need in zip((w_in, w_out), needs[1:3], strict=True))
    grad_weight = torch.empty_like(weight) if weight is not None and needs[3] else None
    factor = None if weight is None else weight.to(x.dtype)[:, None]
    out_size, width = w_out.shape[1:]
    scratch = _scratch(x, counts, max(out_size, x.shape[1]), width, width, h.shape[1])
    act = ACTIVATIONS[block.activation]
    sum_in, sum_out = (None if grad is None else _WeightGradient(grad, counts) for grad in (grad_in, grad_out))
    for expert, run, first, last in _runs(counts):
        gathered, da, a, dh = (t[: run.stop - run.start] for t in scratch)
        (gate, d_gate), *ups = zip(*(t.chunk(2 if block.gated else 1, dim=1) for t in (h[run], dh)), strict=True)
        dy = _take(grad, rows, run, gathered)
        torch.mm(dy, w_out[expert].to(x.dtype), out=da)
        if ups:
            ((up, d_up),) = ups
            torch.mul(act.forward_into(gate, d_up), up, out=a)
        else:
            act.forward_into(gate, a)
        if grad_weight is not None:
            torch.sum(torch.mul(da, a, out=d_gate), dim=1, dtype=grad_weight.dtype, out=grad_weight[run])
        if factor is not None:
            da.mul_(factor[run])
        if sum_out is not None:
            sum_out.add(expert, dy.t(), a if factor is None else a.mul_(factor[run]), first=first, last=last)
        if ups:
            d_up.mul_(da)
            da.mul_(up)
        act.backward_into(da, gate, d_gate)
        if sum_in is not None:
            sum_in.add(expert, dh.t(), _take(x, rows, run, gathered), first=first, last=last)
        if grad_x is not None:
            product(dh, w_in[expert].to(x.dtype), out=grad_x[run])
    if grad_x is not None and rows is not None:
        grad_x = sum_rows(grad_x, rows)
    return grad_x, grad_in, grad_out, grad_weight


def _scratch(x: Tensor, counts: Sequence[int], *widths: int) -> list[Tensor]:
    """Memory for one run of rows after the other, [rows of the longest, width] each."""
    return [x.new_empty(min(LONGEST_RUN, max(counts, default=0)), width) for width in widths]


def _runs(counts: Sequence[int]) -> Iterator[tuple[int, slice, bool, bool]]:
    """(expert, some of its rows, whether they are its first, its last) for all rows."""
    end = 0
    for expert, count in enumerate(counts):
        begin, end = end, end + count
        for start in range(begin, end, LONGEST_RUN):
            yield expert, slice(start, min(end, start + LONGEST_RUN)), start == begin, start + LONGEST_RUN >= end


def _take(x: Tensor, rows: Rows | None, run: slice, memory: Tensor) -> Tensor:
    """The rows of a run, gathered into ``memory`` unless they lie in order."""
    if rows is None:
        return x[run]
    out = memory.view(-1)[: memory.shape[0] * x.shape[1]].view(-1, x.shape[1])
    return torch.index_select(x, 0, rows.token[run], out=out)


class _WeightGradient:
    """Sums of products over the runs of each expert, in at least float32 whatever the gradient's dtype."""

    def __init__(self, grad: Tensor, counts: Sequence[int]) -> None:
        self.grad, self.total = grad, None
        if grad.dtype.itemsize < 4 and max(counts, default=0) > LONGEST_RUN:
            self.total = grad.new_empty(grad.shape[1:], dtype=torch.float32)

    def add(self, expert: int, a: Tensor, b: Tensor, *, first: bool, last: bool) -> None:
        """Adds a @ b to the gradient of an expert."""
        into = self.grad[expert] if self.total is None or (first and last) else self.total
        product(a, b, out=into, add=not first)
        if last and into is self.total:
            self.grad[expert].copy_(into)


def _zero_where_empty(weight: Tensor, counts: Sequence[int]) -> Tensor:
    """Memory for a gradient, zero for experts without rows and not written for the others."""
    grad = torch.empty_like(weight)
    grad[[expert for expert, count in enumerate(counts) if not count]] = 0
    return grad
