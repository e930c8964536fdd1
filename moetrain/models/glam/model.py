"""GLaM's wiring of the shared blocks."""

from __future__ import annotations

import torch
from torch import nn

from moetrain.models.common.attention import SoftmaxAttention
from moetrain.models.common.channel import build_channel
from moetrain.models.common.decoder import Block, Decoder
from moetrain.models.common.init import Constant, FanIn, Normal
from moetrain.models.common.layers import FeedForward, RMSNorm
from moetrain.models.common.positions import RelativeBias
from moetrain.models.glam.config import GLaMConfig
from moetrain.moe.layer import MoEParts


def build(config: GLaMConfig, moe: MoEParts, *, vocab_size: int, dtype: torch.dtype) -> Decoder:
    """The uninitialised model."""
    parameter_dtype = torch.promote_types(dtype, torch.float32)
    hidden, heads, head_dim = config.hidden_size, config.num_heads, config.head_dim

    def norm() -> RMSNorm:
        return RMSNorm(hidden, eps=config.norm_eps, dtype=parameter_dtype)

    def channel(layer: int) -> nn.Module:
        if layer % config.moe_every == config.moe_offset:
            return build_channel(moe, hidden, dtype=parameter_dtype)
        return FeedForward(hidden, config.dense_width, activation="gelu_tanh", dtype=parameter_dtype)

    def block(layer: int) -> Block:
        bias = RelativeBias(heads, num_buckets=config.num_buckets, max_distance=config.max_distance, dtype=parameter_dtype)
        # scores are not divided by sqrt(head_dim): praxis absorbs the factor into the initial queries
        attn = SoftmaxAttention(hidden, num_heads=heads, num_kv_heads=heads, head_dim=head_dim, scale=1.0, bias=bias, dtype=parameter_dtype)
        return Block(name=f"layers.{layer}", attn_norm=norm(), attn=attn, ffn_norm=norm(), ffn=channel(layer))

    return Decoder(
        vocab_size=vocab_size,
        hidden_size=hidden,
        blocks=[block(layer) for layer in range(config.num_layers)],
        norm=norm(),
        head=None,
        head_dim=head_dim,
        rope_theta=None,
        logit_scale=hidden**-0.5,
        compute_dtype=dtype,
        init={
            "*norm.weight": Constant(1.0),
            "embed": Normal(1.0),  # with logits = h / sqrt(M) @ embed^T the first logits have unit variance
            "*.attn.bias.weight": Normal((heads * config.num_buckets) ** -0.5),
            "*.attn.w_q.weight": FanIn(1.0 / head_dim),
            "*": FanIn(),
        },
    )
