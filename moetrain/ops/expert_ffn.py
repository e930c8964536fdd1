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
from moetrain.ops.expert_sets import ExpertSet, sections
from moetrain.ops.grouped_linear import grouped_linear
from moetrain.ops.permute import Rows, combine_rows, gather_rows, sum_rows
from moetrain.ops.product import product

LONGEST_RUN = 1024
"""Rows of one expert that the CPU takes at a time: a busy expert shall not need more memory in between than all others."""


@dataclass(frozen=True)
class Block:
    """What is no tensor with a gradient. counts, num_rows: of each set. rows: as for :func:`expert_ffn`."""

    counts: tuple[Tensor, ...]
    num_rows: tuple[int | None, ...]
    rows: Rows | None
    activation: Activation
    gated: bool

    def sets(self, weights: Sequence[Tensor], dtype: torch.dtype) -> list[ExpertSet]:
        """With their weights, w_in and w_out of each in turn, in this dtype."""
        pairs = zip(weights[::2], weights[1::2], strict=True)
        return [
            ExpertSet(tuple(w.to(dtype) for w in pair), counts, num_rows)
            for pair, counts, num_rows in zip(pairs, self.counts, self.num_rows, strict=True)
        ]

    def for_kernels(self) -> dict[str, Any]:
        """As arguments of the Triton kernels."""
        rows = self.rows
        indices = {name: None if rows is None else getattr(rows, name) for name in ("token", "place", "bounds")}
        return {**indices, "activation": self.activation, "gated": self.gated}


def expert_ffn(
    x: Tensor,
    sets: Sequence[ExpertSet],
    *,
    rows: Rows | None = None,
    weight: Tensor | None = None,
    activation: Activation,
    gated: bool,
) -> Tensor:
    """Rows sorted by expert through their experts; with ``rows`` they are gathered from tokens and summed by token.

    x: [T, D] tokens, or [N, D] rows in order without ``rows``. Weights of a set: w_in [e, 2F (gate above up) or F, D] and w_out
    [e, D', F], in x's dtype, or wider: then they are rounded to it for the products. weight: [N] factor of each row's output in
    the sums of ``rows``, at least float32. Returns [T, D'] or [N, D'] in x's dtype.
    """
    assert weight is None or rows is not None, "weights are those of a sum by token"
    if x.device.type != "cpu" and triton_kernels("expert_ffn", x) is None:
        return reference(x, sets, rows=rows, weight=weight, activation=activation, gated=gated)
    block = Block(tuple(each.counts for each in sets), tuple(each.num_rows for each in sets), rows, activation, gated)
    return _ExpertFFN.apply(x, weight, block, *(w for each in sets for w in each.weights))


def reference(
    x: Tensor, sets: Sequence[ExpertSet], *, rows: Rows | None = None, weight: Tensor | None = None, activation: Activation, gated: bool
) -> Tensor:
    """The same by autograd through separate operations."""
    inputs = x if rows is None else gather_rows(x, rows)
    parts = []
    for each, section in zip(sets, sections(sets, len(inputs)), strict=True):
        w_in, w_out = (w.to(x.dtype) for w in each.weights)
        hidden = hidden_activation(grouped_linear(inputs[section], w_in, each.counts), activation, gated=gated)
        parts.append(grouped_linear(hidden, w_out, each.counts))
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y if rows is None else combine_rows(y, weight, rows)


def saved_bytes_per_row(width: int, dtype: torch.dtype, *, gated: bool) -> int:
    """What one row (one choice of one token) leaves in memory between forward and backward: its hidden units before the
    activation, its weight in float32 (8 bytes in float64), its token and its place (8 bytes each)."""
    return width * (2 if gated else 1) * dtype.itemsize + max(4, dtype.itemsize) + 16


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, block: Block, *weights: Tensor) -> Tensor:  # type: ignore[override]
        kernels = triton_kernels("expert_ffn", x)
        if kernels is None:
            y, h = _forward(x, weights, weight, block)
        else:
            y, h = kernels.forward(x, block.sets(weights, x.dtype), weight=weight, **block.for_kernels())
        indices = () if block.rows is None else block.rows.tensors()
        ctx.save_for_backward(x, h, weight, *weights, *block.counts, *indices)
        ctx.settings = (block.activation, block.gated)
        ctx.num_tokens, ctx.num_rows = block.rows and block.rows.num_tokens, block.num_rows
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, h, weight, *others = ctx.saved_tensors
        num_sets = len(ctx.num_rows)
        weights, counts, indices = others[: 2 * num_sets], others[2 * num_sets : 3 * num_sets], others[3 * num_sets :]
        rows = Rows(indices[0], indices[1], indices[2], ctx.num_tokens) if indices else None
        block = Block(tuple(counts), ctx.num_rows, rows, *ctx.settings)
        needs_x, needs_weight, _, *needs = ctx.needs_input_grad
        kernels = triton_kernels("expert_ffn", x)
        if kernels is None:
            grad_x, grad_weight, gradients = _backward(grad, x, h, weights, weight, block, needs_x, needs_weight, needs)
        else:
            sets = block.sets(weights, x.dtype)
            grad_x, grad_weight, gradients = kernels.backward(
                grad, x, h, sets, weight=weight, needs_x=needs_x, needs=needs, **block.for_kernels()
            )
            gradients = [None if g is None else g.to(w.dtype) for g, w in zip(gradients, weights, strict=True)]
        return grad_x, grad_weight, None, *gradients


def _forward(x: Tensor, weights: Sequence[Tensor], weight: Tensor | None, block: Block) -> tuple[Tensor, Tensor]:
    """The output and h. One product per expert: its rows stay in the cache between the steps, in memory used again."""
    counts, rows = _counts(block), block.rows
    w_in, w_out = _by_expert(weights[::2]), _by_expert(weights[1::2])
    h, y = x.new_empty(sum(counts), weights[0].shape[1]), x.new_empty(sum(counts), weights[1].shape[1])
    scratch = _scratch(x, counts, x.shape[1], weights[1].shape[2])
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
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weights: Sequence[Tensor],
    weight: Tensor | None,
    block: Block,
    needs_x: bool,
    needs_weight: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of x, weight and weights, as far as they are needed. Factors are rounded to the dtype of what they scale."""
    counts, rows = _counts(block), block.rows
    w_in, w_out = _by_expert(weights[::2]), _by_expert(weights[1::2])
    per_set = [c.tolist() for c in block.counts for _ in range(2)]
    gradients = [_zero_where_empty(w, c) if need else None for w, c, need in zip(weights, per_set, needs, strict=True)]
    sum_in, sum_out = (_WeightGradients(gradients[i::2], weights[i::2], counts) for i in range(2))
    grad_x = x.new_empty(h.shape[0], x.shape[1]) if needs_x else None
    grad_weight = torch.empty_like(weight) if weight is not None and needs_weight else None
    factor = None if weight is None else weight.to(x.dtype)[:, None]
    out_size, width = weights[1].shape[1:]
    scratch = _scratch(x, counts, max(out_size, x.shape[1]), width, width, h.shape[1])
    act = ACTIVATIONS[block.activation]
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
        if sum_out.wanted(expert):
            sum_out.add(expert, dy.t(), a if factor is None else a.mul_(factor[run]), first=first, last=last)
        if ups:
            d_up.mul_(da)
            da.mul_(up)
        act.backward_into(da, gate, d_gate)
        if sum_in.wanted(expert):
            sum_in.add(expert, dh.t(), _take(x, rows, run, gathered), first=first, last=last)
        if grad_x is not None:
            product(dh, w_in[expert].to(x.dtype), out=grad_x[run])
    if grad_x is not None and rows is not None:
        grad_x = sum_rows(grad_x, rows)
    return grad_x, grad_weight, gradients


def _counts(block: Block) -> list[int]:
    """Rows per expert, of all sets."""
    return [count for counts in block.counts for count in counts.tolist()]


def _by_expert(weights: Sequence[Tensor]) -> list[Tensor]:
    """The matrix of each expert, of all sets."""
    return [matrix for weight in weights for matrix in weight]


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


class _WeightGradients:
    """Sums of products over the runs of each expert, in at least float32 whatever the gradient's dtype.

    gradients: of one weight of each set, None where it is not needed.
    """

    def __init__(self, gradients: Sequence[Tensor | None], weights: Sequence[Tensor], counts: Sequence[int]) -> None:
        self.matrices: list[Tensor | None] = [
            m for g, w in zip(gradients, weights, strict=True) for m in (g if g is not None else [None] * len(w))
        ]
        narrow = any(g is not None and g.dtype.itemsize < 4 for g in gradients)
        several_runs = max(counts, default=0) > LONGEST_RUN
        self.total = weights[0].new_empty(weights[0].shape[1:], dtype=torch.float32) if narrow and several_runs else None

    def wanted(self, expert: int) -> bool:
        """Whether the gradient of this expert is needed."""
        return self.matrices[expert] is not None

    def add(self, expert: int, a: Tensor, b: Tensor, *, first: bool, last: bool) -> None:
        """Adds a @ b to the gradient of an expert."""
        matrix = self.matrices[expert]
        assert matrix is not None
        into = matrix if self.total is None or matrix.dtype.itemsize >= 4 or (first and last) else self.total
        product(a, b, out=into, add=not first)
        if last and into is not matrix:
            matrix.copy_(into)


def _zero_where_empty(weight: Tensor, counts: Sequence[int]) -> Tensor:
    """Memory for a gradient, zero for experts without rows and not written for the others."""
    grad = torch.empty_like(weight)
    grad[[expert for expert, count in enumerate(counts) if not count]] = 0
    return grad
