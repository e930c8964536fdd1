"""Expert choice (Zhou et al., 2202.09368): each expert takes its best tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moetrain.config import setting
from moetrain.moe.context import RouterContext
from moetrain.moe.routers.base import LearnedRouterConfig, LinearRouter
from moetrain.moe.routing import Routing, ragged_routing
from moetrain.registry import register


@register("router", "expert_choice", source="Expert choice 2202.09368")
@dataclass(kw_only=True)
class ExpertChoiceConfig(LearnedRouterConfig):
    """Every expert takes the C tokens of a group with its largest probabilities, which are also the weights.

    Balanced without a loss. Not causal: a token's experts depend on later tokens of its group.
    """

    factor: float = setting(2.0, doc="experts per token on average: C = floor(factor * tokens of the group / E), at least 1", gt=0)
    scope: Literal["sequence", "rank"] = setting(
        "sequence", doc="token group from which experts choose: each sequence, or the rank's micro-batch (depends on the layout)"
    )
    allow_future: bool = setting(False, doc="let it into a decoder, whose tokens then know something of later ones, in evaluation too")

    @property
    def causal(self) -> bool:
        """Whether a decoder takes it."""
        return self.allow_future

    def make(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> ExpertChoiceRouter:
        return ExpertChoiceRouter(self, hidden_size, num_experts, dtype=dtype)


class ExpertChoiceRouter(LinearRouter):
    """See :class:`ExpertChoiceConfig`."""

    def __init__(self, config: ExpertChoiceConfig, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, num_experts, dtype=dtype)
        self.config, self.causal = config, config.causal

    def forward(self, x: Tensor, ctx: RouterContext) -> Routing:
        """x: [T, D] -> ragged Routing."""
        return self.route(self.logits(x), ctx)

    def route(self, logits: Tensor, ctx: RouterContext) -> Routing:
        """logits: [T, E] in at least float32 -> Routing."""
        probs = torch.softmax(logits, dim=1)
        selected = ctx.once("select", lambda: self.choose(probs.detach(), ctx))
        return ragged_routing(selected, probs, num_experts=self.num_experts, logits=logits, probs=probs, valid=ctx.valid)

    def choose(self, probs: Tensor, ctx: RouterContext) -> Tensor:
        """[T, E] bool: what each expert takes. probs: [T, E] without gradient. Tokens that do not count come last."""
        groups = ctx.batch_size if self.config.scope == "sequence" else 1
        if ctx.valid is not None:
            probs = probs.masked_fill(~ctx.valid[:, None], -1.0)
        grouped = probs.view(groups, -1, probs.shape[1])
        size = grouped.shape[1]
        places = min(size, max(1, int(self.config.factor * size / self.num_experts)))
        best = grouped.topk(places, dim=1).indices
        return torch.zeros_like(grouped, dtype=torch.bool).scatter(1, best, True).view_as(probs)
