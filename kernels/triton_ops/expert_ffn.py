"""The FFN of all experts on CUDA as one forward and one backward: tokens in, combined tokens out.

Neither the sorted copies of the tokens nor the experts' outputs are kept for backward, only h (as SonicMoE does): rows are
gathered again, and the gradient of a combine weight is <grad_y w_out, a> with a recomputed from h. Nothing waits for the
device: counts are only read there. See ``moetrain.ops.expert_ffn`` for the meaning of every argument.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moetrain.kernels.triton_ops.grouped_gemm import activation_backward_gemm, activation_gemm, grouped_gemm
from moetrain.kernels.triton_ops.grouped_outer import grouped_outer
from moetrain.kernels.triton_ops.segment_sum import segment_sum


def forward(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    counts: Tensor,
    *,
    token: Tensor | None,
    weight: Tensor | None,
    place: Tensor | None,
    bounds: Tensor | None,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """y, and h for the backward.

    x: [T, D]; w_in: [e, 2F or F, D] (gate rows above up rows); w_out: [e, Dout, F], both in x's dtype (bfloat16, float16,
    float32); counts: [e] int64 on the device, their sum is N. token: [N] int64, row n is x[token[n]], rows sorted by expert;
    None: row n is x[n]. weight: [N] float32 combine weights or None for 1. place: [N] int64, the rows of token 0, then those of
    token 1, ...; bounds: [T+1] int64 their starts or None if every token has N / T (both unused without token).
    Returns y ([T, Dout], or [N, Dout] without token) and h [N, 2F or F]. No rows or no experts: zeros.
    """
    x, w_in, w_out, counts = x.contiguous(), w_in.contiguous(), w_out.contiguous(), counts.contiguous()
    token, weight = (None if t is None else t.contiguous() for t in (token, weight))
    h, a = activation_gemm(x, w_in, counts, source=token, activation=activation, gated=gated)
    if token is None:
        return grouped_gemm(a, w_out, counts, transposed=True, scale=weight), h
    assert place is not None
    rows = grouped_gemm(a, w_out, counts, transposed=True)
    return segment_sum(rows, x.shape[0], place=place, bounds=bounds, weight=weight), h


def backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    counts: Tensor,
    *,
    token: Tensor | None,
    weight: Tensor | None,
    place: Tensor | None,
    bounds: Tensor | None,
    activation: str,
    gated: bool,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, w_in, w_out (the first three only if needed) and weight (float32, None without weight), from that of y and
    the arguments and h of forward."""
    grad, x, w_in, w_out, counts = (t.contiguous() for t in (grad, x, w_in, w_out, counts))
    token, weight = (None if t is None else t.contiguous() for t in (token, weight))
    grad_h, weighted, grad_weight = activation_backward_gemm(
        grad, w_out, h, counts, source=token, weight=weight, activation=activation, gated=gated
    )
    grad_w_out = grouped_outer(grad, weighted, counts, left_source=token) if needs[2] else None
    del weighted
    grad_w_in = grouped_outer(grad_h, x, counts, right_source=token) if needs[1] else None
    grad_x = grouped_gemm(grad_h, w_in, counts, transposed=False) if needs[0] else None
    if token is not None and grad_x is not None:
        assert place is not None
        grad_x = segment_sum(grad_x, x.shape[0], place=place, bounds=bounds)
    return grad_x, grad_w_in, grad_w_out, grad_weight
