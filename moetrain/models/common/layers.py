"""Linear, norms and dense feed-forward. Weights are [out, in] and are cast to the activations' dtype where they are
used, so that float32 masters serve bfloat16 computation with or without FSDP's own casting."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.models.common.sharding import local_part
from moetrain.ops.activations import Activation, hidden_activation
from moetrain.ops.rms_norm import rms_norm


class Linear(nn.Module):
    """x [..., in] -> x W^T [..., out], no bias."""

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local_part(self.weight).to(x.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in at least float32 (Zhang and Sennrich, 1910.07467)."""

    def __init__(self, hidden_size: int, *, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return rms_norm(wide, self.weight.to(wide.dtype), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation with scale and bias, computed in at least float32 (Ba et al., 1607.06450)."""

    def __init__(self, hidden_size: int, *, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.layer_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.bias.to(wide.dtype), self.eps).to(x.dtype)


class FeedForward(nn.Module):
    """Dense FFN of a block, or an MoE layer's shared expert: gated (SwiGLU, GEGLU) or plain."""

    def __init__(self, hidden_size: int, width: int, *, activation: Activation = "silu", gated: bool = True, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.w_gate = Linear(hidden_size, width, dtype=dtype) if gated else None
        self.w_up = Linear(hidden_size, width, dtype=dtype)
        self.w_down = Linear(width, hidden_size, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.w_gate is None:
            return self.w_down(hidden_activation(self.w_up(x), self.activation, gated=False))
        return self.w_down(hidden_activation(self.w_gate(x), self.activation, gated=False) * self.w_up(x))
