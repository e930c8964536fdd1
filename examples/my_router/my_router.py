"""A router of one's own: a token takes its best expert and all that are nearly as probable."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.config import Component, setting
from moetrain.moe.context import RouterContext
from moetrain.moe.routers.base import LinearRouter
from moetrain.moe.routing import Routing, ragged_routing
from moetrain.registry import register


@register("router", "my_router", source="examples/my_router")
@dataclass(kw_only=True)
class MyRouterConfig(Component):
    """Every expert that is at least `ratio` times as probable as the best; the weights are the probabilities."""

    ratio: float = setting(0.5, doc="part of the best probability that another expert needs", gt=0, le=1)

    def build(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> "MyRouter":
        router = MyRouter(hidden_size, num_experts, dtype=dtype)
        router.ratio = self.ratio
        return router


class MyRouter(LinearRouter):
    ratio: float

    def forward(self, x: Tensor, ctx: RouterContext) -> Routing:
        logits = self.logits(x)
        probs = torch.softmax(logits, dim=1)
        # a choice goes through `once`: activation checkpointing must meet the same one again
        selected = ctx.once("select", lambda: probs >= self.ratio * probs.max(dim=1, keepdim=True).values)
        return ragged_routing(selected, probs, num_experts=self.num_experts, logits=logits, probs=probs, valid=ctx.valid)
