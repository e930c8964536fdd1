"""DeepSeekMoE (2401.06066): fine-grained routed experts beside an always-on shared expert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from moetrain.config import Component, setting
from moetrain.errors import Problem
from moetrain.models.common.decoder import Decoder
from moetrain.moe.layer import MoEParts
from moetrain.registry import register


@register("model", "deepseek_moe", source="DeepSeekMoE 2401.06066")
@dataclass(kw_only=True)
class DeepSeekMoEConfig(Component):
    """Decoder LM: RMSNorm, rotary attention, SwiGLU; fine-grained experts and a shared expert."""

    hidden_size: int = setting(doc="D, width of the residual stream", ge=1)
    num_layers: int = setting(doc="blocks", ge=1)
    num_heads: int = setting(doc="attention heads", ge=1)
    num_kv_heads: int | None = setting(None, doc="key/value heads (grouped-query); default: num_heads", ge=1)
    head_dim: int = setting(doc="width of a head; even, for the rotary embedding", ge=2)
    num_experts: int = setting(doc="E, routed experts per MoE layer", ge=1)
    top_k: int = setting(doc="K, routed experts per token", ge=1)
    expert_width: int = setting(doc="F, hidden width of a routed expert", ge=1)
    shared_width: int = setting(doc="hidden width of the shared expert; 0: none", ge=0)
    dense_layers: int = setting(1, doc="first blocks with a dense FFN instead of experts", ge=0)
    dense_width: int = setting(doc="hidden width of the dense FFN", ge=1)
    vocab_size: int | None = setting(None, doc="V; default: the tokenizer's", ge=2)
    tie_embeddings: bool = setting(False, doc="output matrix is the embedding")
    rope_theta: float = setting(10000.0, doc="base of the rotary frequencies", gt=0)
    norm_eps: float = setting(1e-6, doc="epsilon of RMSNorm", gt=0)
    init_std: float = setting(0.006, doc="standard deviation of all initial matrices [2401.06066 section 4.1.3]", gt=0)

    def problems(self, path: str) -> Iterable[Problem]:
        kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            yield Problem(f"{path}.num_kv_heads", kv_heads, f"must divide {path}.num_heads ({self.num_heads})")
        if self.head_dim % 2:
            yield Problem(f"{path}.head_dim", self.head_dim, "must be even")
        if self.dense_layers > self.num_layers:
            yield Problem(f"{path}.dense_layers", self.dense_layers, f"must be <= {path}.num_layers ({self.num_layers})")

    def build(self, moe: MoEParts, *, vocab_size: int, dtype: torch.dtype) -> Decoder:
        """The model, uninitialised. dtype: of computation; parameters are at least float32."""
        from moetrain.models.deepseek_moe.model import build

        return build(self, moe, vocab_size=self.vocab_size or vocab_size, dtype=dtype)
