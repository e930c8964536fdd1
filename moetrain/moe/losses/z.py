"""Router z-loss (ST-MoE, 2202.08906 eq. 5): keeps the logits small."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.config import Component, setting
from moetrain.moe.context import RouterContext
from moetrain.moe.losses.base import Loss
from moetrain.moe.routing import Routing
from moetrain.registry import register


@register("loss", "z_loss", source="ST-MoE 2202.08906 eq. 5")
@dataclass(kw_only=True)
class ZLossConfig(Component):
    """Mean over tokens of logsumexp(logits)^2; log(E)^2 at zero logits."""

    coefficient: float = setting(0.001, doc="weight; ST-MoE 0.001", ge=0)

    def build(self) -> ZLoss:
        return ZLoss(coefficient=self.coefficient, scope="token")


class ZLoss(Loss):
    def forward(self, routing: Routing, ctx: RouterContext) -> Tensor:
        assert routing.logits is not None, "z-loss needs the router's logits"
        squared = torch.logsumexp(routing.logits, dim=1).square()
        if ctx.valid is None:
            return squared.mean()
        return torch.where(ctx.valid, squared, 0.0).sum() / ctx.valid.sum().clamp_min(1)
