"""Grouped linear layer: rows sorted by expert, one weight matrix per expert.

Backends: ``torch.nn.functional.grouped_mm`` where it can run (float32, bfloat16, float16; row strides of whole
16-byte units), else one plain product per expert, which is also the reference: float64 has no grouped kernel.
The backward is written out because autograd's own would return the weight gradient in a transposed layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """y[r] = weight[e(r)] @ x[r], where the first counts[0] rows belong to expert 0, the next counts[1] to expert 1, ...

    x: [R, D], R = counts.sum(). weight: [e, F, D], same dtype. counts: [e] int64. Returns [R, F].
    """
    return _GroupedLinear.apply(x, weight, counts)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:  # type: ignore[override]
        x = x.contiguous()  # grouped_mm refuses rows whose stride is not a whole number of 16-byte units
        ctx.save_for_backward(x, weight, counts)
        return _rows_times(x, weight.transpose(1, 2), counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x, weight, counts = ctx.saved_tensors
        if not x.shape[0]:  # contiguous() leaves the strides of an empty expanded gradient as they are
            return torch.zeros_like(x), torch.zeros_like(weight), None
        grad = grad.contiguous()  # an expanded gradient has strides that grouped_mm refuses
        grad_x = _rows_times(grad, weight, counts) if ctx.needs_input_grad[0] else None
        grad_weight = _outer(grad, x, counts) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def _grouped_mm_runs(*operands: Tensor) -> bool:
    return all(t.dtype in _GROUPED_DTYPES and t.shape[-1] * t.element_size() % 16 == 0 and t.shape[-2] * t.element_size() % 16 == 0
               for t in operands)  # fmt: skip


def _offsets(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)


def _rows_times(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [R, A] times weight [e, A, B] per group -> [R, B]."""
    if _grouped_mm_runs(weight) and x.dtype in _GROUPED_DTYPES:
        return F.grouped_mm(x, weight, offs=_offsets(counts))
    rows = x.split(counts.tolist())
    return torch.cat([part @ w for part, w in zip(rows, weight.unbind(0), strict=True)]) if rows else x.new_zeros(0, weight.shape[2])


def _outer(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """grad [R, A], x [R, B] -> per group grad^T x, [e, A, B]; exactly zero for an empty group."""
    if grad.dtype in _GROUPED_DTYPES and all(t.shape[1] * t.element_size() % 16 == 0 for t in (grad, x)):
        return F.grouped_mm(grad.t(), x, offs=_offsets(counts))
    sizes = counts.tolist()
    parts = [g.t() @ v for g, v in zip(grad.split(sizes), x.split(sizes), strict=True)]
    return torch.stack(parts) if parts else grad.new_zeros(0, grad.shape[1], x.shape[1])
