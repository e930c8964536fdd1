"""Position information: rotary embedding and T5-style relative bias.

Tables are computed in every forward pass from the positions, so that nothing has to survive allocation on meta.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moetrain.models.common.sharding import local_part
from moetrain.ops.rotary import rotate


def rope_table(positions: Tensor, head_dim: int, theta: float, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [S, head_dim / 2], in at least float32. positions: [S] int64. (RoFormer, 2104.09864)"""
    wide = torch.promote_types(dtype, torch.float32)
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=wide) / head_dim)
    angle = positions.to(wide)[:, None] * frequency
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x [B, H, S, head_dim]; dimension i is paired with i + head_dim / 2 (half-split convention)."""
    cos, sin = (t.to(x.dtype) for t in table)
    return rotate(x, cos, sin)


class RelativeBias(nn.Module):
    """Bias added to attention scores by head and logarithmic distance bucket, causal (T5, 1910.10683)."""

    def __init__(self, num_heads: int, *, num_buckets: int, max_distance: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.weight = nn.Parameter(torch.empty(num_heads, num_buckets, dtype=dtype))

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """query: [S] positions, key: [S'] positions -> [H, S, S']."""
        return local_part(self.weight)[:, self.bucket((query[:, None] - key[None, :]).clamp_min(0))]

    def bucket(self, distance: Tensor) -> Tensor:
        """Bucket of a distance >= 0: exact below half of the buckets, logarithmic up to max_distance, then the last."""
        exact = self.num_buckets // 2
        log = torch.log(distance.clamp_min(1).double() / exact) / math.log(self.max_distance / exact) * (self.num_buckets - exact)
        far = (exact + log.long()).clamp_max(self.num_buckets - 1)
        return torch.where(distance < exact, distance, far)
