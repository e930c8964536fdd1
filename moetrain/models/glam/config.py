"""GLaM (2112.06905): dense and MoE blocks alternate; un-gated experts, top-2 with capacity, T5 relative bias.

The paper leaves details open; they follow the layout in google/praxis (glam.py) and are marked below.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from moetrain.config import Component, setting
from moetrain.errors import Problem
from moetrain.models.common.decoder import Decoder
from moetrain.moe.layer import MoEParts
from moetrain.registry import register


@register("model", "glam", source="GLaM 2112.06905; layout of google/praxis")
@dataclass(kw_only=True)
class GLaMConfig(Component):
    """Decoder LM: every other block's FFN is a top-2 MoE with capacity; T5 relative bias, tied embedding."""

    hidden_size: int = setting(doc="M in the paper, width of the residual stream", ge=1)
    num_layers: int = setting(doc="blocks", ge=1)
    num_heads: int = setting(doc="attention heads", ge=1)
    head_dim: int = setting(doc="width of a head", ge=1)
    num_experts: int = setting(doc="E, experts per MoE layer", ge=1)
    top_k: int = setting(2, doc="K, experts per token", ge=1)
    expert_width: int = setting(doc="H in the paper, hidden width of an expert", ge=1)
    dense_width: int = setting(doc="hidden width of the GEGLU in the dense blocks", ge=1)
    moe_every: int = setting(2, doc="one block in this many is an MoE block", ge=1)
    moe_offset: int = setting(0, doc="first MoE block; 0 as in praxis, 1 in most other codes", ge=0)
    vocab_size: int | None = setting(None, doc="V; default: the tokenizer's", ge=2)
    num_buckets: int = setting(32, doc="buckets of the relative bias [praxis]", ge=2)
    max_distance: int = setting(128, doc="distance in tokens from which on the last bucket is used [praxis]", ge=2)
    norm_eps: float = setting(1e-6, doc="epsilon of RMSNorm [praxis]", gt=0)

    def problems(self, path: str) -> Iterable[Problem]:
        if self.moe_offset >= self.moe_every:
            yield Problem(f"{path}.moe_offset", self.moe_offset, f"must be < {path}.moe_every ({self.moe_every})")
        if self.max_distance <= self.num_buckets // 2:
            yield Problem(f"{path}.max_distance", self.max_distance, f"must be > half of {path}.num_buckets ({self.num_buckets})")

    def build(self, moe: MoEParts, *, vocab_size: int, dtype: torch.dtype) -> Decoder:
        """The model, uninitialised. dtype: of computation; parameters are at least float32."""
        from moetrain.models.glam.model import build

        return build(self, moe, vocab_size=self.vocab_size or vocab_size, dtype=dtype)
