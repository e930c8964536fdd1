"""The top-k router with gating residuals of MoE++ (2410.07348 eq. 6): scores of the layer before enter those of this one.

G_1 = W_1 x, G_j = W_j x + V_j G_(j-1). V starts at zero, as the plain router; the paper does not say how.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moetrain.config import setting
from moetrain.errors import Problem
from moetrain.moe.context import RouterContext
from moetrain.moe.routers.base import at_least_float32
from moetrain.moe.routers.topk import TopKRouter, TopKRouterConfig
from moetrain.moe.routing import Routing
from moetrain.registry import register


@register("router", "residual_topk", source="MoE++ 2410.07348 eq. 6")
@dataclass(kw_only=True)
class ResidualTopKRouterConfig(TopKRouterConfig):
    """Top-k of scores to which a linear map of the previous MoE layer's scores is added; otherwise the settings of topk."""

    hidden_multiple: int = setting(
        0, doc="scores by two matrices with tanh between, of this times E' units (released code 8); 0: one", ge=0
    )
    standard_deviation: float | None = setting(
        None, doc="scores are scaled to this deviation over the experts of a token before the softmax (option of the released code)", gt=0
    )

    def problems(self, path: str) -> Iterable[Problem]:
        yield from super().problems(path)
        if self.logit_bias:
            yield Problem(f"{path}.logit_bias", True, "must be false: these scores have no bias")

    def make(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> ResidualTopKRouter:
        return ResidualTopKRouter(self, hidden_size, num_experts, dtype=dtype)


class ResidualTopKRouter(TopKRouter):
    """weight: [E', D], or [E', H] behind hidden: [H, D]. residual: [E', E'], not used in the first MoE layer."""

    def __init__(self, config: ResidualTopKRouterConfig, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> None:
        columns = num_experts + config.zero_experts.count
        units = config.hidden_multiple * columns
        super().__init__(config, units or hidden_size, num_experts, dtype=dtype)
        self.initial = {**self.initial, "residual": 0.0}
        self.standard_deviation = config.standard_deviation
        self.hidden = nn.Parameter(torch.empty(units, hidden_size, dtype=dtype)) if units else None
        self.residual = nn.Parameter(torch.empty(columns, columns, dtype=dtype))

    def logits(self, x: Tensor) -> Tensor:
        """[T, E'] in at least float32, before the residual."""
        if self.hidden is not None:
            x = at_least_float32(x)
            x = torch.tanh(nn.functional.linear(x, self.hidden.to(x.dtype)))
        return super().logits(x)

    def route(self, logits: Tensor, ctx: RouterContext, noise_std: Tensor | None = None) -> Routing:
        """logits: [T, E'] of this layer alone -> Routing."""
        previous = ctx.take_over("scores")
        if previous is not None:
            logits = logits + nn.functional.linear(previous, self.residual.to(logits.dtype))
        ctx.hand_over("scores", logits)
        if self.standard_deviation is not None:
            logits = logits * (self.standard_deviation / logits.std(dim=1, keepdim=True))
        return super().route(logits, ctx, noise_std)
