"""Noisy top-k: the spread of the noise on each logit is learned (Shazeer et al., 1701.06538 eq. 3-5)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.config import setting
from moetrain.errors import Problem
from moetrain.moe.context import RouterContext
from moetrain.moe.routers.base import at_least_float32
from moetrain.moe.routers.topk import Score, TopKRouter, TopKRouterConfig
from moetrain.moe.routing import Routing
from moetrain.registry import register


@register("router", "noisy_topk", source="Shazeer 1701.06538 eq. 3-5")
@dataclass(kw_only=True)
class NoisyTopKRouterConfig(TopKRouterConfig):
    """Top-k of logits with learned noise in training, softmax over the K; otherwise the settings of topk."""

    score: Score = setting("logit", doc="affinity from the noisy logits")
    selected_softmax: bool = setting(True, doc="weights are the softmax over the K selected scores")
    noise_epsilon: float = setting(0.01, doc="smallest deviation of the noise; the rest is softplus(x W_noise)", gt=0)

    def problems(self, path: str) -> Iterable[Problem]:
        yield from super().problems(path)
        if self.logit_noise:
            yield Problem(f"{path}.logit_noise", self.logit_noise, "must be 0: this router learns its noise")

    @property
    def provides(self) -> frozenset[str]:
        """Names that a routing has in ``aux`` in training."""
        return frozenset({"clean_logits", "noise_std"})

    def make(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> NoisyTopKRouter:
        return NoisyTopKRouter(self, hidden_size, num_experts, dtype=dtype)


class NoisyTopKRouter(TopKRouter):
    """weight, noise_weight: [E', D]. Both start at zero, which makes the first choices even and random (appendix A)."""

    initial = {"weight": 0.0, "noise_weight": 0.0}

    def __init__(self, config: NoisyTopKRouterConfig, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> None:
        super().__init__(config, hidden_size, num_experts, dtype=dtype)
        self.noise_weight = nn.Parameter(torch.empty(self.num_columns, hidden_size, dtype=dtype))
        self.epsilon = config.noise_epsilon

    def forward(self, x: Tensor, ctx: RouterContext) -> Routing:
        """x: [T, D] -> fixed-k Routing."""
        x = self.jittered(x, ctx)
        if not ctx.training:
            return self.route(self.logits(x), ctx)
        x = at_least_float32(x)
        # one product reads x, and in backward writes its gradient, once
        both = F.linear(x, torch.cat([self.weight, self.noise_weight]).to(x.dtype))
        logits, spread = both.chunk(2, dim=1)
        if self.bias is not None:
            logits = logits + self.bias.to(x.dtype)
        return self.route(logits, ctx, noise_std=F.softplus(spread) + self.epsilon)
