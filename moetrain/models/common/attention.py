"""Softmax attention: multi-head and grouped-query, causal, with optional rotary embedding or relative bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.models.common.layers import Linear
from moetrain.models.common.positions import RelativeBias, apply_rope


class KeyValueCache:
    """Keys and values of the positions seen so far, by attention module, for decoding."""

    def __init__(self) -> None:
        self.length = 0
        self._entries: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, owner: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append key and value [B, H, S, dh] to the owner's and return all of them."""
        if id(owner) in self._entries:
            old_key, old_value = self._entries[id(owner)]
            key, value = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
        self._entries[id(owner)] = (key, value)
        return key, value


@dataclass
class AttentionInput:
    """What all attention layers of a pass share. positions: [S] of the queries; rope: cos and sin tables or None;
    document: [B, S] document numbers or None; cache: for decoding."""

    positions: Tensor
    rope: tuple[Tensor, Tensor] | None = None
    document: Tensor | None = None
    cache: KeyValueCache | None = None


class SoftmaxAttention(nn.Module):
    """x [B, S, D] -> [B, S, D]. scale: of the scores, default 1 / sqrt(head_dim)."""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float | None = None,
        bias: RelativeBias | None = None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.scale = num_heads, num_kv_heads, head_dim, scale
        self.w_q = Linear(hidden_size, num_heads * head_dim, dtype=dtype)
        self.w_k = Linear(hidden_size, num_kv_heads * head_dim, dtype=dtype)
        self.w_v = Linear(hidden_size, num_kv_heads * head_dim, dtype=dtype)
        self.w_o = Linear(num_heads * head_dim, hidden_size, dtype=dtype)
        self.bias = bias

    def forward(self, x: Tensor, shared: AttentionInput) -> Tensor:
        heads = lambda t: t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # noqa: E731
        query, key, value = heads(self.w_q(x)), heads(self.w_k(x)), heads(self.w_v(x))
        if shared.rope is not None:
            query, key = apply_rope(query, shared.rope), apply_rope(key, shared.rope)
        if shared.cache is not None:
            key, value = shared.cache.extend(self, key, value)
        mask = self.mask(shared, key.shape[2], query.dtype)
        causal = mask is None and query.shape[2] > 1
        grouped = self.num_kv_heads != self.num_heads
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=grouped)
        return self.w_o(y.transpose(1, 2).flatten(2))

    def mask(self, shared: AttentionInput, num_keys: int, dtype: torch.dtype) -> Tensor | None:
        """Additive or boolean mask, or None where plain causal attention (or one new token) says it all."""
        queries = shared.positions
        chunked = shared.cache is not None and num_keys > queries.numel() > 1
        if self.bias is None and shared.document is None and not chunked:
            return None
        keys = torch.arange(num_keys, device=queries.device) if shared.cache is not None else queries
        allowed = keys[None, :] <= queries[:, None]
        if shared.document is not None:
            allowed = allowed & (shared.document[:, None, :, None] == shared.document[:, None, None, :])
        if self.bias is None:
            return allowed
        return self.bias(queries, keys).to(dtype).masked_fill(~allowed, -torch.inf)
