"""Entropies of the expert distribution: mutual-information balance and load concentration (ModuleFormer, 2306.04640).

H(m) is the entropy of the mean probabilities of a token group, H(m|x) the mean entropy of a token's. H(m) is not linear
in a token, so the mean is taken over the whole scope, with its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moetrain.config import Component, setting
from moetrain.moe.context import RouterContext
from moetrain.moe.losses.balance import _SCOPE_DOC, BalanceScope
from moetrain.moe.losses.base import GroupSums, Loss, sum_by_group
from moetrain.moe.routing import Routing
from moetrain.registry import register

EPSILON = 1e-8
"""Inside the logarithm of a mean probability, as in the released code."""


@register("loss", "mutual_information", source="ModuleFormer 2306.04640 section 3.3")
@dataclass(kw_only=True)
class MutualInformationConfig(Component):
    """H(m|x) - H(m), the negative mutual information of experts and tokens: -log E for certain choices in balance, 0 if
    all tokens have the same probabilities."""

    coefficient: float = setting(0.001, doc="weight of the loss; the paper does not give its own", ge=0)
    scope: BalanceScope = setting("micro_step", doc=_SCOPE_DOC)
    padding: Literal["excluded", "released"] = setting(
        "excluded", doc="released: padding counts in the number of tokens that divides the sums, as in the authors' code"
    )

    def build(self) -> MutualInformation:
        return MutualInformation(self)


class MutualInformation(Loss):
    def __init__(self, config: MutualInformationConfig) -> None:
        super().__init__(coefficient=config.coefficient, scope=config.scope)
        self.padding = config.padding

    def forward(self, routing: Routing, ctx: RouterContext) -> Tensor:
        assert routing.probs is not None, "this loss needs the router's probabilities"
        sums = GroupSums(routing, ctx, self.scope)
        tokens = sums.tokens
        if self.padding == "released":
            size = torch.full_like(tokens, routing.num_tokens / sums.num_groups)
            tokens = ctx.reduce(size, self.scope)
        tokens = tokens.clamp_min(1)
        certainty = sum_by_group(token_entropy(routing)[:, None], ctx, self.scope)[:, 0]
        return sums.mean_over_groups(certainty / tokens - entropy(sums.probs / tokens[:, None]))


@register("loss", "load_concentration", source="ModuleFormer 2306.04640 section 3.3")
@dataclass(kw_only=True)
class LoadConcentrationConfig(Component):
    """H(m), for fine-tuning: gathers a task on few experts; log E at balance, 0 if one expert has everything."""

    coefficient: float = setting(0.001, doc="weight of the loss; the paper does not give its own", ge=0)
    scope: BalanceScope = setting("micro_step", doc=_SCOPE_DOC)

    def build(self) -> LoadConcentration:
        return LoadConcentration(coefficient=self.coefficient, scope=self.scope)


class LoadConcentration(Loss):
    def forward(self, routing: Routing, ctx: RouterContext) -> Tensor:
        sums = GroupSums(routing, ctx, self.scope)
        return sums.mean_over_groups(entropy(sums.probs / sums.tokens.clamp_min(1)[:, None]))


def entropy(probs: Tensor) -> Tensor:
    """[G] entropies in nats of mean probabilities [G, E]."""
    return -(probs * (probs + EPSILON).log()).sum(1)


def token_entropy(routing: Routing) -> Tensor:
    """[T] entropies in nats; finite with its gradient where a probability underflows."""
    probs = routing.probs
    assert probs is not None
    return -(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(1)
