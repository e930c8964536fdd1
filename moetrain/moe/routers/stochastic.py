"""Stochastic experts (THOR, 2110.04260): no gate, experts are drawn evenly at random in training and inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moetrain.config import Component, setting
from moetrain.moe.context import Granularity, RouterContext
from moetrain.moe.routers.base import Router
from moetrain.moe.routing import Routing, fixed_routing
from moetrain.registry import register


@register("router", "stochastic", source="THOR 2110.04260")
@dataclass(kw_only=True)
class StochasticRouterConfig(Component):
    """One expert at random, with weight 1. Goes with objective=consistency; balanced without a loss."""

    granularity: Granularity = setting(
        "pass", doc="training: what draws an expert of its own; pass: whole batch as the released code, so one expert gets all tokens"
    )
    evaluation: Literal["token", "sequence", "pass", "ensemble"] = setting(
        "token", doc="the same in evaluation; ensemble: the mean of all experts, at E times the cost"
    )

    def build(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> StochasticRouter:
        return StochasticRouter(self, num_experts)


class StochasticRouter(Router):
    """See :class:`StochasticRouterConfig`. No parameters; logits are zero and probabilities even."""

    def __init__(self, config: StochasticRouterConfig, num_experts: int) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts

    def forward(self, x: Tensor, ctx: RouterContext) -> Routing:
        """x: [T, D] -> fixed-k Routing, K = 1 (E for the ensemble)."""
        granularity = self.config.granularity if ctx.training else self.config.evaluation
        logits = torch.zeros(x.shape[0], self.num_experts, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        if granularity == "ensemble":
            index = torch.arange(self.num_experts, device=x.device).expand(x.shape[0], -1)
        else:
            draws = ctx.uniform("expert", 1, per=granularity, dtype=torch.float64, device=x.device)
            index = ctx.once("select", lambda: (draws * self.num_experts).long())
        weight = torch.full_like(index, 1, dtype=logits.dtype) / index.shape[1]
        probs = torch.softmax(logits, dim=1)
        return fixed_routing(index, weight, num_experts=self.num_experts, logits=logits, probs=probs, valid=ctx.valid)
