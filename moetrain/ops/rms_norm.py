"""Root mean square normalisation (Zhang and Sennrich, 1910.07467) with a written-out backward.

torch has one kernel for it on CUDA; on CPU it runs as a chain of elementwise operations, whose backward alone has a dozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x: [..., D]; weight: [D] of the same dtype."""
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        scale = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_()[..., None]
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        product = grad * x  # [..., D]
        grad_weight = product.reshape(-1, weight.numel()).t() @ scale.reshape(-1)
        slope = (product @ weight)[..., None] * (scale**3 / x.shape[-1])
        grad_x = torch.mul(grad, weight, out=product).mul_(scale).addcmul_(x, slope, value=-1)
        return grad_x, grad_weight, None
