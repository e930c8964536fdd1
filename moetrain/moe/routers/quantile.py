"""Quantile balancing: the selection bias is the price at which each expert sells its fair share of places.

The choice of K experts for each token with the largest sum of scores, such that each expert is chosen equally often, is a
linear program (Su, "MoE Odyssey 6: optimal allocation", kexue.fm/archives/11619). One step of coordinate descent on its dual
is: alpha_t, the (K+1)-th best of token t's scores minus prices; then the price of expert e, the (nK/E + 1)-th largest over
the n tokens of score minus alpha. Megatron-Core takes it over each micro-batch of a rank; here it is taken over each sequence
and averaged over the step, which depends on no layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetrain.config import setting
from moetrain.errors import Problem
from moetrain.moe.context import LayerStatistics, RouterContext
from moetrain.moe.routers.topk import TopKRouter, TopKRouterConfig, score
from moetrain.moe.routing import Routing
from moetrain.registry import register


@register("router", "quantile_topk", source="Quantile balancing, kexue.fm/archives/11619; Megatron-Core")
@dataclass(kw_only=True)
class QuantileTopKRouterConfig(TopKRouterConfig):
    """Top-k under a selection bias that is computed after each step, without a rate to tune; otherwise the settings of topk."""

    selection_bias: bool = setting(True, doc="must be true: it is what this router computes")

    def problems(self, path: str) -> Iterable[Problem]:
        yield from super().problems(path)
        if not self.selection_bias:
            yield Problem(f"{path}.selection_bias", False, "must be true: it is what this router computes")
        if self.bias_update_rate:
            yield Problem(f"{path}.bias_update_rate", self.bias_update_rate, "must be 0: the bias is computed anew after each step")
        if self.num_groups > 1 or self.top_k_start is not None:
            yield Problem(path, self.kind, f"needs {path}.num_groups=1 and no {path}.top_k_start")

    def check(self, path: str, *, num_experts: int) -> Iterable[Problem]:
        yield from super().check(path, num_experts=num_experts)
        columns = num_experts + self.zero_experts.count
        if self.top_k >= columns:
            yield Problem(f"{path}.top_k", self.top_k, f"must be < the {columns} experts, of which one must be left out")

    def make(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> QuantileTopKRouter:
        return QuantileTopKRouter(self, hidden_size, num_experts, dtype=dtype)


class QuantileTopKRouter(TopKRouter):
    """See the module's docstring. selection_bias: minus the prices of the last step."""

    selection_bias: Tensor

    def route(self, logits: Tensor, ctx: RouterContext, noise_std: Tensor | None = None) -> Routing:
        """logits: [T, E'] in at least float32 -> Routing."""
        routing = super().route(logits, ctx, noise_std)
        if not ctx.training:
            return routing
        return replace(routing, aux={**routing.aux, "step_sums": ctx.once("prices", lambda: self.step_sums(routing, ctx))})

    def step_sums(self, routing: Routing, ctx: RouterContext) -> Tensor:
        """[E' + 1] float64: the sum over sequences of their prices, and the number of sequences with valid tokens."""
        assert routing.logits is not None
        scores = score(routing.logits, self.config.score).view(ctx.batch_size, -1, self.num_columns)
        valid = scores.new_ones(scores.shape[:2], dtype=torch.bool) if ctx.valid is None else ctx.valid.view(scores.shape[:2])
        prices, counted = quantile_prices(scores, self.selection_bias.to(scores.dtype), valid, self.top_k)
        return torch.cat([prices[counted].double().sum(0), counted.double().sum().view(1)])

    @torch.no_grad()
    def end_step(self, statistics: LayerStatistics) -> None:
        """The mean of the prices becomes the bias."""
        self.selection_bias.copy_(-statistics.router[:-1] / statistics.router[-1].clamp_min(1))


def quantile_prices(scores: Tensor, bias: Tensor, valid: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Prices [G, E] of the experts in each group of tokens, and whether a group has valid tokens [G].

    scores: [G, S, E]; bias: [E], minus the prices so far; valid: [G, S].
    """
    experts = scores.shape[2]
    least = (scores + bias).topk(top_k + 1, dim=2).values[:, :, -1:]
    margin = torch.where(valid[:, :, None], scores - least, -torch.inf).sort(dim=1, descending=True).values
    tokens = valid.sum(1)
    place = (tokens * top_k // experts)[:, None, None].expand(-1, 1, experts)
    return margin.gather(1, place)[:, 0], tokens > 0
