"""Feed-forward experts: a gated linear unit (SwiGLU and relatives) or a plain two-matrix MLP per expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from moetrain.config import Component, setting
from moetrain.moe.experts.base import Experts, ExpertTensor
from moetrain.moe.experts.spawn import SpawnSettings
from moetrain.ops.activations import Activation
from moetrain.ops.expert_ffn import expert_ffn
from moetrain.ops.expert_sets import ExpertSet
from moetrain.ops.permute import Rows
from moetrain.registry import register


@register("experts", "ffn", source="GShard 2006.16668; SwiGLU 2002.05202")
@dataclass(kw_only=True)
class FFNExpertsConfig(Component):
    """Feed-forward experts, without biases."""

    num_experts: int = setting(doc="E, routed experts per MoE layer", ge=1, follows="model.num_experts")
    width: int = setting(doc="hidden width of one expert", ge=1, follows="model.expert_width")
    activation: Activation = setting("silu", doc="activation of the hidden layer (of the gate, if gated)")
    gated: bool = setting(True, doc="gated linear unit with three matrices; false: two matrices")
    spawn: SpawnSettings = setting(default_factory=SpawnSettings, doc="one FFN first, from which the experts are made")

    def build(self, hidden_size: int, *, dtype: torch.dtype) -> FFNExperts:
        return FFNExperts(self, hidden_size, dtype=dtype)


class FFNExperts(Experts):
    """w_in: [e, 2F (gate above up) or F, D]; w_out: [e, D, F]. Both are [out, in], applied as x W^T."""

    def __init__(self, config: FFNExpertsConfig, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__(config.num_experts)
        self.config = config
        rows = config.width * (2 if config.gated else 1)
        self.w_in = nn.Parameter(torch.empty(config.num_experts, rows, hidden_size, dtype=dtype))
        self.w_out = nn.Parameter(torch.empty(config.num_experts, hidden_size, config.width, dtype=dtype))

    def tensors(self) -> Sequence[ExpertTensor]:
        hidden, width = self.w_out.shape[1:]
        gate = [ExpertTensor("w_gate", "w_in", 0, width, split_dim=0)] if self.config.gated else []
        start = width if self.config.gated else 0
        up = ExpertTensor("w_up", "w_in", start, start + width, split_dim=0)
        return [*gate, up, ExpertTensor("w_down", "w_out", 0, hidden, split_dim=1)]

    @record_function("moe.experts")
    def compute(self, x: Tensor, counts: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        return expert_ffn(x, [ExpertSet(weights, counts)], activation=self.config.activation, gated=self.config.gated)

    @record_function("moe.experts")
    def execute(self, x: Tensor, rows: Rows, weight: Tensor | None, sets: Sequence[ExpertSet]) -> Tensor:
        return expert_ffn(x, sets, rows=rows, weight=weight, activation=self.config.activation, gated=self.config.gated)

    def flops_per_row(self) -> int:
        return 2 * sum(p.shape[1] * p.shape[2] for p in self.parameters())
