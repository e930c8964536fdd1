"""The layerwise recurrent router of RMoE (2408.06793): a small GRU runs along depth, for each token, and its state scores experts.

u = A x, h = cell(u, h of the MoE layer before), logits = B h. A and B belong to the layer, the cell to the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moetrain.config import setting
from moetrain.moe.context import RouterContext
from moetrain.moe.routers.base import at_least_float32
from moetrain.moe.routers.topk import TopKRouter, TopKRouterConfig
from moetrain.moe.routing import Routing
from moetrain.registry import register


@register("router", "recurrent_topk", source="RMoE 2408.06793 section 3")
@dataclass(kw_only=True)
class RecurrentTopKRouterConfig(TopKRouterConfig):
    """Top-k of scores of a recurrent state that travels from MoE layer to MoE layer; otherwise the settings of topk."""

    state_size: int = setting(128, doc="P, width of the state; RMoE 128", ge=1)
    cell: Literal["gru", "rnn"] = setting("gru", doc="recurrent cell, one for all layers")
    state: Literal["carried", "detached", "restarted"] = setting(
        "carried", doc="the previous layer's state, with its gradient; without (ablation); zero in every layer (ablation)"
    )

    def make(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> RecurrentTopKRouter:
        return RecurrentTopKRouter(self, hidden_size, num_experts, dtype=dtype)


class RecurrentTopKRouter(TopKRouter):
    """projection: [P, D], A. weight: [E', P], B. cell: GRUCell or RNNCell (tanh) of P by P, the same in all layers of a model."""

    tied = ("cell",)

    def __init__(self, config: RecurrentTopKRouterConfig, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> None:
        size = config.state_size
        super().__init__(config, size, num_experts, dtype=dtype)
        self.state = config.state
        self.projection = nn.Parameter(torch.empty(size, hidden_size, dtype=dtype))
        self.cell: nn.GRUCell | nn.RNNCell = {"gru": nn.GRUCell, "rnn": nn.RNNCell}[config.cell](size, size, dtype=dtype)

    def forward(self, x: Tensor, ctx: RouterContext) -> Routing:
        """x: [T, D] -> fixed-k Routing."""
        return self.route(self.logits(self.advance(self.jittered(x, ctx), ctx)), ctx)

    def advance(self, x: Tensor, ctx: RouterContext) -> Tensor:
        """[T, P], this layer's state, in at least float32: rounding would add up over depth."""
        x = at_least_float32(x)
        previous = ctx.take_over("router_state")
        if previous is not None and self.state == "detached":
            previous = previous.detach()
        elif self.state == "restarted":
            previous = None
        state = self.cell(nn.functional.linear(x, self.projection.to(x.dtype)), previous)
        ctx.hand_over("router_state", state)
        return state
