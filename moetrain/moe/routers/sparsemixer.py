"""SparseMixer: sampled experts with an estimate of the gradient through the choice (2310.00811, 2409.12136).

K rounds, each over the experts that are left: those within a band below the best take part, one is chosen (drawn in
training), its weight is the softmax over the band. In training the weight is one of two points of Heun's third-order rule,
while its gradient is that of the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.config import setting
from moetrain.moe.context import RouterContext
from moetrain.moe.routers.base import LearnedRouterConfig, LinearRouter
from moetrain.moe.routing import Routing, fixed_routing
from moetrain.registry import register

HEUN_POINT = 1 / 3
HEUN_CHANCE = 0.75
"""A drawn expert that is not the best enters at a third of its weight, in three of four draws."""


@register("router", "sparsemixer", source="SparseMixer 2310.00811, SparseMixer-v2 2409.12136")
@dataclass(kw_only=True)
class SparseMixerConfig(LearnedRouterConfig):
    """K rounds of one sampled expert each, weights not normalised against each other (Phi-3.5-MoE)."""

    top_k: int = setting(doc="experts per token", ge=1, follows="model.top_k")
    band: float = setting(0.01, doc="eps: experts further than 2 eps below the best, relative to their size, do not take part", gt=0)

    def make(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> SparseMixer:
        return SparseMixer(self, hidden_size, num_experts, dtype=dtype)


class SparseMixer(LinearRouter):
    """See the module's docstring."""

    def __init__(self, config: SparseMixerConfig, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, num_experts, dtype=dtype)
        self.top_k, self.band = config.top_k, config.band

    def forward(self, x: Tensor, ctx: RouterContext) -> Routing:
        """x: [T, D] -> fixed-k Routing."""
        return self.route(self.logits(x), ctx)

    def route(self, logits: Tensor, ctx: RouterContext) -> Routing:
        """logits: [T, E] in at least float32 -> Routing."""
        experts, weights = [], []
        left = logits.detach()
        for turn in range(self.top_k):
            # from the logits themselves: their gradient need not pass through the rounds before
            banded = torch.softmax(logits.masked_fill(self.outside(logits.detach(), left), -torch.inf), dim=1)
            expert, factor = ctx.once(f"round_{turn}", lambda p=banded, t=turn: self.choose(p.detach(), t, ctx))  # type: ignore[misc]
            weight = banded.gather(1, expert)
            weights.append(weight + (weight * (factor - 1)).detach())
            experts.append(expert)
            left = left.scatter(1, expert, -torch.inf)
        return fixed_routing(
            torch.cat(experts, dim=1),
            torch.cat(weights, dim=1),
            num_experts=self.num_experts,
            logits=logits,
            probs=torch.softmax(logits, dim=1),
            valid=ctx.valid,
        )

    def outside(self, logits: Tensor, left: Tensor) -> Tensor:
        """[T, E] bool: experts that are taken, or too far below the best of those that are left."""
        best = left.max(dim=1, keepdim=True).values
        return best - left > 2 * self.band * logits.abs().clamp_min(best)

    def choose(self, probs: Tensor, turn: int, ctx: RouterContext) -> tuple[Tensor, Tensor]:
        """Expert [T, 1] and the factor [T, 1] on its weight. probs: [T, E] over the band, without gradient."""
        best = probs.argmax(dim=1, keepdim=True)
        if not ctx.training:
            return best, torch.ones_like(probs[:, :1])
        draws = ctx.uniform(f"round_{turn}", 2, dtype=probs.dtype, device=probs.device)
        # the first expert up to which the probabilities exceed the draw. There is one: a draw below 1 with no more digits than
        # the sum has makes a product below the sum
        summed = probs.cumsum(dim=1)
        drawn = torch.searchsorted(summed, draws[:, :1] * summed[:, -1:], right=True)
        whole = (drawn == best) | (draws[:, 1:] >= HEUN_CHANCE)
        return drawn, torch.full_like(probs[:, :1], HEUN_POINT).masked_fill(whole, 1.0)
