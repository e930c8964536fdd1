"""Entropy of the router's probabilities: keeps top-p routing (dynamic routing, 2403.07652) from buying experts with doubt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.config import Component, setting
from moetrain.moe.context import RouterContext
from moetrain.moe.losses.base import Loss
from moetrain.moe.routing import Routing
from moetrain.registry import register


@register("loss", "entropy", source="Dynamic routing 2403.07652 section 3")
@dataclass(kw_only=True)
class EntropyConfig(Component):
    """Mean over tokens of -sum_e P_e log P_e (nats); log(E) where all experts are equally likely, 0 without doubt."""

    coefficient: float = setting(1e-4, doc="weight; dynamic routing 1e-4", ge=0)

    def build(self) -> Entropy:
        return Entropy(coefficient=self.coefficient, scope="token")


class Entropy(Loss):
    def forward(self, routing: Routing, ctx: RouterContext) -> Tensor:
        assert routing.probs is not None, "this loss needs the router's probabilities"
        # the logarithm's gradient at a probability that has underflown would be infinite
        log_probs = routing.probs.clamp_min(torch.finfo(routing.probs.dtype).tiny).log()
        per_token = -(routing.probs * log_probs).sum(dim=1)
        if ctx.valid is None:
            return per_token.mean()
        return torch.where(ctx.valid, per_token, 0.0).sum() / ctx.valid.sum().clamp_min(1)
