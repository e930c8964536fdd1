"""Router z-loss (ST-MoE, 2202.08906 eq. 5): keeps the logits small."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetrain.config import Component, setting
from moetrain.errors import Problem
from moetrain.moe.context import RouterContext
from moetrain.moe.losses.base import Loss, mean_over_tokens
from moetrain.moe.routing import Routing
from moetrain.registry import register


@register("loss", "z_loss", source="ST-MoE 2202.08906 eq. 5")
@dataclass(kw_only=True)
class ZLossConfig(Component):
    """Mean over tokens of logsumexp(logits)^2; log(E)^2 at zero logits."""

    coefficient: float = setting(0.001, doc="weight; ST-MoE 0.001", ge=0)

    def check(self, path: str, *, num_experts: int, router: Any) -> Iterable[Problem]:
        if "logits" in getattr(router, "lacks", ()):
            yield Problem(path, self.kind, f"needs a router with logits, {router.kind} has none")

    def build(self) -> ZLoss:
        return ZLoss(coefficient=self.coefficient, scope="token")


class ZLoss(Loss):
    def forward(self, routing: Routing, ctx: RouterContext) -> Tensor:
        assert routing.logits is not None, "z-loss needs the router's logits"
        return mean_over_tokens(torch.logsumexp(routing.logits, dim=1).square(), ctx)
