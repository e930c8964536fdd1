"""DeepSeekMoE's wiring of the shared blocks."""

from __future__ import annotations

import torch
from torch import nn

from moetrain.models.common.attention import SoftmaxAttention
from moetrain.models.common.channel import build_channel
from moetrain.models.common.decoder import Block, Decoder
from moetrain.models.common.init import Constant, Normal
from moetrain.models.common.layers import FeedForward, Linear, RMSNorm
from moetrain.models.deepseek_moe.config import DeepSeekMoEConfig
from moetrain.moe.layer import MoEParts


def build(config: DeepSeekMoEConfig, moe: MoEParts, *, vocab_size: int, dtype: torch.dtype) -> Decoder:
    """The uninitialised model."""
    parameter_dtype = torch.promote_types(dtype, torch.float32)
    hidden = config.hidden_size

    def norm() -> RMSNorm:
        return RMSNorm(hidden, eps=config.norm_eps, dtype=parameter_dtype)

    def channel(layer: int) -> nn.Module:
        if layer < config.dense_layers:
            return FeedForward(hidden, config.dense_width, dtype=parameter_dtype)
        shared = FeedForward(hidden, config.shared_width, dtype=parameter_dtype) if config.shared_width else None
        return build_channel(moe, hidden, dtype=parameter_dtype, shared=shared)

    def block(layer: int) -> Block:
        attn = SoftmaxAttention(
            hidden,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads or config.num_heads,
            head_dim=config.head_dim,
            dtype=parameter_dtype,
        )
        return Block(name=f"layers.{layer}", attn_norm=norm(), attn=attn, ffn_norm=norm(), ffn=channel(layer))

    return Decoder(
        vocab_size=vocab_size,
        hidden_size=hidden,
        blocks=[block(layer) for layer in range(config.num_layers)],
        norm=norm(),
        head=None if config.tie_embeddings else Linear(hidden, vocab_size, dtype=parameter_dtype),
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        logit_scale=1.0,
        compute_dtype=dtype,
        init={"*norm.weight": Constant(1.0), "*.router.bias": Constant(0.0), "*": Normal(config.init_std)},
    )
