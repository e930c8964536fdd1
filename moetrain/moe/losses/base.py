"""Auxiliary losses: pure functions of a routing, with a coefficient, a scope and a stated normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.moe.context import RouterContext, Scope
from moetrain.moe.routing import PAD, Routing
from moetrain.ops.count import count


class Loss(nn.Module):
    """forward(routing before capacity, ctx) -> scalar: the mean over the local units of ``scope``. The layer multiplies
    it by ``coefficient`` and by ``ctx.share(scope)``."""

    scope: Scope
    coefficient: float

    def __init__(self, *, coefficient: float, scope: Scope) -> None:
        super().__init__()
        self.coefficient = coefficient
        self.scope = scope

    def forward(self, routing: Routing, ctx: RouterContext) -> Tensor:
        raise NotImplementedError


def sum_by_group(values: Tensor, ctx: RouterContext, scope: Scope, num_groups: int = 1) -> Tensor:
    """[G, E] sums of values [T, E] over the valid tokens of each token group of a scope, see :class:`GroupSums`."""
    groups = ctx.batch_size if scope == "sequence" else num_groups
    values = values if ctx.valid is None else values * ctx.valid[:, None]
    tokens, experts = values.shape
    return ctx.reduce(values.view(groups, tokens // groups, experts).sum(1), scope)


def mean_over_tokens(values: Tensor, ctx: RouterContext) -> Tensor:
    """Mean of values [T] over the valid tokens; zero (with gradient) if there are none."""
    if ctx.valid is None:
        return values.mean()
    return torch.where(ctx.valid, values, 0.0).sum() / ctx.valid.sum().clamp_min(1)


class GroupSums:
    """Per token group g of a scope: choices per expert and summed probabilities.

    counts: [G, E] choices, without gradient. probs: [G, E] summed over the valid tokens, with gradient.
    tokens: [G] valid tokens. With scope sequence each sequence is a group; with rank the tokens are cut into
    ``num_groups`` equal runs; with micro_step there is one group, summed over the data-parallel world.
    """

    def __init__(
        self,
        routing: Routing,
        ctx: RouterContext,
        scope: Scope,
        *,
        expert: Tensor | None = None,
        token: Tensor | None = None,
        num_groups: int = 1,
    ) -> None:
        assert routing.probs is not None, "this loss needs the router's probabilities"
        expert = routing.expert if expert is None else expert
        token = routing.token if token is None else token
        num_tokens, experts = routing.probs.shape
        self.num_groups = ctx.batch_size if scope == "sequence" else num_groups
        size = num_tokens // self.num_groups
        real = expert != PAD
        counts = count(torch.where(real, (token // size) * experts + expert, PAD), self.num_groups * experts)
        if ctx.valid is None:
            tokens = torch.full((self.num_groups,), size, device=expert.device)
        else:
            tokens = ctx.valid.view(self.num_groups, size).sum(1)
        self.counts = ctx.reduce(counts.view(self.num_groups, experts).to(routing.probs.dtype), scope)
        self.probs = sum_by_group(routing.probs, ctx, scope, num_groups)
        self.tokens = ctx.reduce(tokens.to(routing.probs.dtype), scope)

    def mean_over_groups(self, values: Tensor) -> Tensor:
        """Mean of values [G] over the groups that have valid tokens; zero (with gradient) if none has."""
        real = self.tokens > 0
        return torch.where(real, values, 0.0).sum() / real.sum().clamp_min(1)
