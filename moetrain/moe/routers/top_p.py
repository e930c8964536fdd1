"""Top-p routing (dynamic routing, 2403.07652): as many experts as it takes to cover a share of the probability.

The threshold must be exceeded, as in the authors' code; the paper's rule (reached) differs only where a sum of
probabilities equals it exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.config import setting
from moetrain.errors import Problem
from moetrain.moe.context import RouterContext
from moetrain.moe.routers.base import LearnedRouterConfig, LinearRouter
from moetrain.moe.routing import Routing, ragged_routing
from moetrain.registry import register


@register("router", "top_p", source="Dynamic routing 2403.07652 section 3")
@dataclass(kw_only=True)
class TopPRouterConfig(LearnedRouterConfig):
    """Each token takes the fewest experts whose softmax probabilities, which are also the weights, sum to more than p."""

    threshold: float = setting(0.4, doc="p, probability that a token's experts must exceed together; 0: one expert, 1: all", ge=0, le=1)
    max_experts: int | None = setting(None, doc="experts per token at most; default: no limit", ge=1)

    def check(self, path: str, *, num_experts: int) -> Iterable[Problem]:
        """Rules that involve the number of experts."""
        if self.max_experts is not None and self.max_experts > num_experts:
            yield Problem(f"{path}.max_experts", self.max_experts, f"must be <= experts.num_experts ({num_experts})")

    def make(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> TopPRouter:
        return TopPRouter(self, hidden_size, num_experts, dtype=dtype)


class TopPRouter(LinearRouter):
    """See :class:`TopPRouterConfig`."""

    def __init__(self, config: TopPRouterConfig, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, num_experts, dtype=dtype)
        self.config = config

    def forward(self, x: Tensor, ctx: RouterContext) -> Routing:
        """x: [T, D] -> ragged Routing."""
        logits = self.logits(x)
        probs = torch.softmax(logits, dim=1)
        selected = ctx.once("select", lambda: self.select(probs.detach()))
        return ragged_routing(selected, probs, num_experts=self.num_experts, logits=logits, probs=probs, valid=ctx.valid)

    def select(self, probs: Tensor) -> Tensor:
        """[T, E] bool: an expert is taken as long as the more probable ones together do not exceed the threshold."""
        ranked, expert = probs.sort(dim=1, descending=True, stable=True)
        # summed without the expert itself: subtracting it from the running sum would round
        before = torch.cat([torch.zeros_like(ranked[:, :1]), ranked.cumsum(dim=1)[:, :-1]], dim=1)
        # a sum of all probabilities may end above 1
        kept = before <= self.config.threshold if self.config.threshold < 1 else torch.ones_like(before, dtype=torch.bool)
        if self.config.max_experts is not None:
            kept[:, self.config.max_experts :] = False
        return torch.zeros_like(kept).scatter_(1, expert, kept)
