"""Load and importance balance of a router with noisy logits: even probabilities, and even chances to be chosen.

Shazeer et al. (1701.06538) introduced the pair; this is Tutel's form (2206.03382): one threshold per token,
probabilities instead of combine weights, and the mean of the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moetrain.config import Component, setting
from moetrain.errors import Problem
from moetrain.moe.context import RouterContext
from moetrain.moe.losses.balance import _SCOPE_DOC, BalanceScope
from moetrain.moe.losses.base import GroupSums, Loss, sum_by_group
from moetrain.moe.routing import Routing
from moetrain.registry import register

REQUIRES = frozenset({"clean_logits", "noise_std"})
"""What it needs in the routing's ``aux``."""

EPSILON = 1e-10
"""Added to the squared mean, as Shazeer's and Tutel's code do."""


@register("loss", "load_importance", source="Tutel 2206.03382, after Shazeer 1701.06538")
@dataclass(kw_only=True)
class LoadImportanceConfig(Component):
    """Half of CV^2(importance) + CV^2(load); 0 at balance. Needs a router with logit_noise.

    importance_e: sum over tokens of the noise-free probability. load_e: sum over tokens of the probability that noise
    drawn anew lifts expert e above the token's K-th largest noisy logit.
    """

    coefficient: float = setting(0.01, doc="weight of the loss", ge=0)
    scope: BalanceScope = setting("sequence", doc=_SCOPE_DOC)
    compared: Literal["logits", "probs"] = setting(
        "logits", doc="what is compared with that noisy logit: noise-free logits, or noise-free probabilities as Tutel's code does"
    )

    def check(self, path: str, *, num_experts: int, router: Any) -> Iterable[Problem]:
        if not getattr(router, "provides", frozenset()) >= REQUIRES:
            yield Problem(path, self.kind, "needs a router with noise on its logits, e.g. router=topk router.logit_noise=1")
        if getattr(router, "score", "softmax") not in ("softmax", "logit"):
            yield Problem(path, self.kind, "needs a router whose probabilities are the softmax of its logits")
        if num_experts < 2:
            yield Problem(path, self.kind, "needs at least two experts to balance")

    def build(self) -> LoadImportance:
        return LoadImportance(self)


class LoadImportance(Loss):
    """See :class:`LoadImportanceConfig`. Neither sum is linear in a token, so both are summed over the scope with their gradients."""

    def __init__(self, config: LoadImportanceConfig) -> None:
        super().__init__(coefficient=config.coefficient, scope=config.scope)
        self.compared = config.compared

    def forward(self, routing: Routing, ctx: RouterContext) -> Tensor:
        assert routing.logits is not None and routing.top_k is not None, "this loss needs the logits of a fixed-k router"
        clean, std = routing.aux["clean_logits"], routing.aux["noise_std"]
        probs = torch.softmax(clean, dim=1)
        threshold = routing.logits.topk(routing.top_k, dim=1).values[:, -1:]
        chance = torch.special.ndtr(((probs if self.compared == "probs" else clean) - threshold) / std)
        importance, load = (sum_by_group(values, ctx, self.scope) for values in (probs, chance))
        value = (squared_variation(importance) + squared_variation(load)) / 2
        return GroupSums(routing, ctx, self.scope).mean_over_groups(value)


def squared_variation(values: Tensor) -> Tensor:
    """[G] squared coefficient of variation of each row of [G, E], with the unbiased variance."""
    return values.var(dim=1) / (values.mean(dim=1).square() + EPSILON)
