"""Heterogeneous balance loss of MoE++ (2410.07348 eq. 7): zero-computation experts may take more tokens than the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetrain.config import Component, setting
from moetrain.errors import Problem
from moetrain.moe.context import RouterContext
from moetrain.moe.experts.zero import count_zero_experts
from moetrain.moe.losses.balance import _SCOPE_DOC, BalanceScope
from moetrain.moe.losses.base import GroupSums, Loss
from moetrain.moe.routing import Routing
from moetrain.registry import register


@register("loss", "heterogeneous_balance", source="MoE++ 2410.07348 eq. 7")
@dataclass(kw_only=True)
class HeterogeneousBalanceConfig(Component):
    """sum_e eta_e f_e P_e, f_e choices of e per token, eta = tau for zero-computation experts and 1 for the others.

    K (E + tau Z) / (E + Z)^2 at uniform load. It pulls 1 / tau as many choices to a zero-computation expert as to another.
    """

    coefficient: float = setting(0.01, doc="weight; MoE++ 0.01", ge=0)
    tau: float = setting(0.75, doc="weight of zero-computation experts; MoE++ 0.75, 0.1 to 1", gt=0, le=1)
    scope: BalanceScope = setting("sequence", doc=_SCOPE_DOC)

    def check(self, path: str, *, num_experts: int, router: Any) -> Iterable[Problem]:
        if not count_zero_experts(router):
            yield Problem(path, self.kind, "needs a router with zero_experts")

    def build(self) -> HeterogeneousBalance:
        return HeterogeneousBalance(self)


class HeterogeneousBalance(Loss):
    def __init__(self, config: HeterogeneousBalanceConfig) -> None:
        super().__init__(coefficient=config.coefficient, scope=config.scope)
        self.tau = config.tau

    def forward(self, routing: Routing, ctx: RouterContext) -> Tensor:
        sums = GroupSums(routing, ctx, self.scope)
        tokens = sums.tokens.clamp_min(1)[:, None]
        real = torch.arange(sums.counts.shape[1], device=sums.counts.device) < routing.num_experts
        eta = torch.where(real, 1.0, self.tau).to(sums.counts.dtype)
        return sums.mean_over_groups((eta * (sums.counts / tokens) * (sums.probs / tokens)).sum(1))
