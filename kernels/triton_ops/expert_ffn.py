"""The FFN of all experts on CUDA as one forward and one backward: tokens in, combined tokens out.

Neither the sorted copies of the tokens nor the experts' outputs are kept for backward, only h (as SonicMoE does): rows are
gathered again, and the gradient of a combine weight is <grad_y w_out, a> with a recomputed from h. Nothing waits for the
device: counts are only read there. See ``moetrain.ops.expert_ffn`` for the meaning of every argument.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moetrain.kernels.triton_ops.grouped_gemm import activation_backward_gemm, activation_gemm, grouped_gemm
from moetrain.kernels.triton_ops.grouped_outer import grouped_outer
from moetrain.kernels.triton_ops.segment_sum import segment_sum
from moetrain.ops.expert_sets import ExpertSet, sections


def forward(
    x: Tensor,
    sets: Sequence[ExpertSet],
    *,
    token: Tensor | None,
    weight: Tensor | None,
    place: Tensor | None,
    bounds: Tensor | None,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """y, and h for the backward.

    x: [T, D]; sets: weights w_in [e, 2F or F, D] (gate rows above up rows) and w_out [e, Dout, F], all in x's dtype (bfloat16,
    float16, float32), counts [e] int64 on the device; all counts sum to N. token: [N] int64, row n is x[token[n]], rows sorted by
    expert; None: row n is x[n]. weight: [N] float32 combine weights or None for 1. place: [N] int64, the rows of token 0, then
    those of token 1, ...; bounds: [T+1] int64 their starts or None if every token has N / T (both unused without token).
    Returns y ([T, Dout], or [N, Dout] without token) and h [N, 2F or F]. No rows or no experts: zeros.
    """
    x = x.contiguous()
    token, weight = (None if t is None else t.contiguous() for t in (token, weight))
    num_rows = x.shape[0] if token is None else token.shape[0]
    w_in, w_out = sets[0].weights
    h, y = x.new_empty(num_rows, w_in.shape[1]), x.new_empty(num_rows, w_out.shape[1])
    for each, rows in zip(sets, sections(sets, num_rows), strict=True):
        w_in, w_out = (_with_whole_matrices(w) for w in each.weights)
        inputs, source = (x[rows], None) if token is None else (x, token[rows])
        _, a = activation_gemm(inputs, w_in, each.counts, source=source, activation=activation, gated=gated, h=h[rows])
        scale = None if token is not None or weight is None else weight[rows]
        grouped_gemm(a, w_out, each.counts, transposed=True, scale=scale, out=y[rows])
    if token is None:
        return y, h
    assert place is not None
    return segment_sum(y, x.shape[0], place=place, bounds=bounds, weight=weight), h


def backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    sets: Sequence[ExpertSet],
    *,
    token: Tensor | None,
    weight: Tensor | None,
    place: Tensor | None,
    bounds: Tensor | None,
    activation: str,
    gated: bool,
    needs_x: bool = True,
    needs: Sequence[bool] | None = None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of x and weight (float32, None without weight), and of w_in and w_out of each set in turn, from that of y and the
    arguments and h of forward. needs_x: whether that of x is wanted; needs: which of the last are, None: all."""
    grad, x = grad.contiguous(), x.contiguous()
    token, weight = (None if t is None else t.contiguous() for t in (token, weight))
    num_rows = h.shape[0]
    needs = [True] * (2 * len(sets)) if needs is None else needs
    grad_x = x.new_empty(num_rows, x.shape[1]) if needs_x else None
    dots: list[Tensor] = []
    gradients: list[Tensor | None] = []
    for i, (each, rows) in enumerate(zip(sets, sections(sets, num_rows), strict=True)):
        w_in, w_out = (_with_whole_matrices(w) for w in each.weights)
        inputs, outputs, source = (x[rows], grad[rows], None) if token is None else (x, grad, token[rows])
        grad_h, weighted, dot = activation_backward_gemm(
            outputs, w_out, h[rows], each.counts, source=source, weight=None if weight is None else weight[rows],
            activation=activation, gated=gated,
        )  # fmt: skip
        if dot is not None:
            dots.append(dot)
        grad_out = grouped_outer(outputs, weighted, each.counts, left_source=source) if needs[2 * i + 1] else None
        del weighted
        gradients += [grouped_outer(grad_h, inputs, each.counts, right_source=source) if needs[2 * i] else None, grad_out]
        if grad_x is not None:
            grouped_gemm(grad_h, w_in, each.counts, transposed=False, out=grad_x[rows])
    if token is not None and grad_x is not None:
        assert place is not None
        grad_x = segment_sum(grad_x, x.shape[0], place=place, bounds=bounds)
    grad_weight = None if not dots else dots[0] if len(dots) == 1 else torch.cat(dots)
    return grad_x, grad_weight, gradients


def _with_whole_matrices(w: Tensor) -> Tensor:
    """w: [e, rows, columns], each expert's matrix contiguous; copies of experts lie in one buffer with their other weights."""
    return w if not len(w) or w[0].is_contiguous() else w.contiguous()
