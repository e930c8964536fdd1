"""Squared coefficients of variation over the experts: of what they weigh, and of how likely they are chosen.

The two losses of Shazeer et al. (1701.06538 eq. 6-11). Neither is linear in a token, so the sums over the token group
are taken with their gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetrain.config import Component, setting
from moetrain.errors import Problem
from moetrain.moe.context import RouterContext
from moetrain.moe.losses.balance import _SCOPE_DOC, BalanceScope
from moetrain.moe.losses.base import GroupSums, Loss, sum_by_group
from moetrain.moe.losses.load_importance import REQUIRES, squared_variation
from moetrain.moe.routing import PAD, Routing
from moetrain.registry import register


@dataclass(kw_only=True)
class _VariationConfig(Component):
    coefficient: float = setting(0.1, doc="weight of the loss; the paper's 0.1", ge=0)
    scope: BalanceScope = setting("micro_step", doc=_SCOPE_DOC)

    def check(self, path: str, *, num_experts: int, router: Any) -> Iterable[Problem]:
        if num_experts < 2:
            yield Problem(path, self.kind, "needs at least two experts to balance")


@register("loss", "importance", source="Shazeer 1701.06538 eq. 6-7")
@dataclass(kw_only=True)
class ImportanceConfig(_VariationConfig):
    """CV^2 over experts of the sums of their combine weights; 0 at balance."""

    def build(self) -> Importance:
        return Importance(coefficient=self.coefficient, scope=self.scope)


class Importance(Loss):
    def forward(self, routing: Routing, ctx: RouterContext) -> Tensor:
        assert routing.probs is not None, "this loss needs a router with probabilities"
        token, expert = routing.token, routing.expert
        real = expert != PAD
        weights = torch.zeros_like(routing.probs).index_put(
            (token, expert.clamp_min(0)), torch.where(real, routing.weight, 0.0).to(routing.probs.dtype), accumulate=True
        )
        value = squared_variation(sum_by_group(weights, ctx, self.scope))
        return GroupSums(routing, ctx, self.scope).mean_over_groups(value)


@register("loss", "load", source="Shazeer 1701.06538 eq. 8-11")
@dataclass(kw_only=True)
class LoadConfig(_VariationConfig):
    """CV^2 over experts of their expected loads; 0 at balance. Needs a router with noise on its logits.

    The load of an expert is the sum over tokens of the probability that it is among the K best if its noise alone is
    drawn again. With K = E every expert has every token, and the loss is 0.
    """

    def check(self, path: str, *, num_experts: int, router: Any) -> Iterable[Problem]:
        yield from super().check(path, num_experts=num_experts, router=router)
        if not getattr(router, "provides", frozenset()) >= REQUIRES:
            yield Problem(path, self.kind, "needs a router with noise on its logits, e.g. router=noisy_topk")

    def build(self) -> Load:
        return Load(coefficient=self.coefficient, scope=self.scope)


class Load(Loss):
    def forward(self, routing: Routing, ctx: RouterContext) -> Tensor:
        chance = chance_of_choice(routing)
        return GroupSums(routing, ctx, self.scope).mean_over_groups(squared_variation(sum_by_group(chance, ctx, self.scope)))


def chance_of_choice(routing: Routing) -> Tensor:
    """[T, E]: probability that an expert's logit beats the K-th best of the others' when its noise is drawn anew."""
    assert routing.logits is not None and routing.top_k is not None, "this loss needs the logits of a fixed-k router"
    noisy, top_k = routing.logits, routing.top_k
    if top_k == noisy.shape[1]:
        return torch.ones_like(noisy)
    best = noisy.topk(top_k + 1, dim=1).values
    kth, next_best = best[:, -2:-1], best[:, -1:]
    # one of the K best has K - 1 of them as rivals, and the next one; the others have all K
    threshold = torch.where(noisy >= kth, next_best, kth)
    return torch.special.ndtr((routing.aux["clean_logits"] - threshold) / routing.aux["noise_std"])
