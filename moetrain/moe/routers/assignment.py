"""Balanced choices in training: BASE's linear assignment and Sinkhorn-normalised scores; plain top-k in evaluation.

The choice carries no gradient, which flows through the weights alone. In training a token's experts depend on the other
tokens of its group, later ones included; in evaluation they do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moetrain.config import setting
from moetrain.errors import Problem
from moetrain.moe.capacity.policies import place_in_queue
from moetrain.moe.context import RouterContext
from moetrain.moe.routers.topk import Score, TopKRouter, TopKRouterConfig
from moetrain.registry import register

Group = Literal["sequence", "rank"]
_GROUP_DOC = "token group that is balanced in training: each sequence, or the rank's tokens (depends on the layout)"
MAX_SCALINGS = 1000
DIVISOR_EPSILON = 1e-8


@dataclass(kw_only=True)
class _BalancedConfig(TopKRouterConfig):
    scope: Group = setting("sequence", doc=_GROUP_DOC)

    def problems(self, path: str) -> Iterable[Problem]:
        yield from super().problems(path)
        if self.sampling != "none" or self.selection_bias or self.num_groups > 1:
            yield Problem(path, self.kind, "needs no sampling, selection bias or groups: it chooses by balance")


@register("router", "sinkhorn", source="S-BASE 2202.01169, Megatron-Core")
@dataclass(kw_only=True)
class SinkhornConfig(_BalancedConfig):
    """Training: top-k of exp(logits) scaled to even rows and columns. Weights from the logits: sigmoid if k = 1, else softmax."""

    score: Score = setting("softmax", doc="affinity from the logits; Megatron-Core: sigmoid with top_k=1, else softmax")
    tolerance: float = setting(1e-4, doc="scaling ends when the column factors change by less than this on average", gt=0)

    def make(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> SinkhornRouter:
        return SinkhornRouter(self, hidden_size, num_experts, dtype=dtype)


class SinkhornRouter(TopKRouter):
    """See :class:`SinkhornConfig`."""

    def __init__(self, config: SinkhornConfig, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> None:
        super().__init__(config, hidden_size, num_experts, dtype=dtype)
        self.scope, self.tolerance = config.scope, config.tolerance

    def choose(self, logits: Tensor, scores: Tensor, ctx: RouterContext) -> Tensor:
        if not ctx.training:
            return self.select(logits)
        grouped, valid = by_group(logits, self.scope, ctx)
        return self.select(sinkhorn(grouped, valid, self.tolerance).flatten(0, 1))


@register("router", "base", source="BASE layers 2103.16716")
@dataclass(kw_only=True)
class BaseConfig(_BalancedConfig):
    """Training: each expert gets the same number of tokens, by the assignment with the largest sum of logits.

    Evaluation: the best expert. The weight is the sigmoid a of the logit. The paper's y = a f(x) + (1 - a) x has a residual
    inside f; with f(x) = x + FFN(x) that is x + a FFN(x), what a residual block makes of this router.
    """

    top_k: int = setting(1, doc="experts per token; must be 1", ge=1, le=1)
    score: Score = setting("sigmoid", doc="weight from the logit")
    epsilon: float = setting(0.01, doc="what a token may miss of its best choice, as a part of the range of the logits", gt=0)

    def make(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> BaseRouter:
        return BaseRouter(self, hidden_size, num_experts, dtype=dtype)


class BaseRouter(TopKRouter):
    """See :class:`BaseConfig`."""

    def __init__(self, config: BaseConfig, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> None:
        super().__init__(config, hidden_size, num_experts, dtype=dtype)
        self.scope, self.epsilon = config.scope, config.epsilon

    def choose(self, logits: Tensor, scores: Tensor, ctx: RouterContext) -> Tensor:
        if not ctx.training:
            return self.select(logits)
        grouped, valid = by_group(logits, self.scope, ctx)
        return balanced_assignment(grouped, valid, self.epsilon).view(-1, 1)


def by_group(values: Tensor, scope: Group, ctx: RouterContext) -> tuple[Tensor, Tensor]:
    """values [T, E] as [G, S, E], and which of the tokens count, [G, S] bool."""
    groups = ctx.batch_size if scope == "sequence" else 1
    grouped = values.view(groups, -1, values.shape[1])
    valid = torch.ones(grouped.shape[:2], dtype=torch.bool, device=values.device) if ctx.valid is None else ctx.valid.view(groups, -1)
    return grouped, valid


def sinkhorn(logits: Tensor, valid: Tensor, tolerance: float) -> Tensor:
    """exp(logits) of each group with factors on rows and columns such that the rows of its n valid tokens sum to 1 / n and
    columns to 1 / E. logits: [G, S, E]; valid: [G, S]; returns [G, S, E], zero for other tokens.

    Groups end on their own: what one gets does not depend on the others.
    """
    experts = logits.shape[2]
    # a factor on a row changes nothing but that row's own factor
    cost = (logits - logits.max(dim=2, keepdim=True).values).exp() * valid[:, :, None]
    tokens = valid.sum(1).clamp_min(1)[:, None, None]
    row, column = torch.zeros_like(cost[:, :, :1]), torch.ones_like(cost[:, :1])
    going = valid.any(1)[:, None, None]
    for _ in range(MAX_SCALINGS):
        row = torch.where(going, 1 / (tokens * ((column * cost).sum(2, keepdim=True) + DIVISOR_EPSILON)), row)
        scaled = torch.where(going, 1 / (experts * ((row * cost).sum(1, keepdim=True) + DIVISOR_EPSILON)), column)
        going = going & ((scaled - column).abs().mean((1, 2), keepdim=True) > tolerance)
        column = scaled
        if not going.any():
            break
    return row * cost * column


def balanced_assignment(scores: Tensor, valid: Tensor, epsilon: float) -> Tensor:
    """Experts [G, S] of the tokens of each group, at most ceil(n / E) of its n valid tokens for each expert, such that the
    sum of scores [G, S, E] is within n * epsilon * (their range) of the largest. Tokens that are not valid get expert 0.

    An auction (Bertsekas, "The auction algorithm", 1988) with experts as objects of many equal copies: tokens without an
    expert bid what makes their best one as dear as the second best, an expert keeps its highest bidders, and the lowest of
    those bids is its price.
    """
    groups, size, experts = scores.shape
    if experts == 1:
        return torch.zeros(groups, size, dtype=torch.int64, device=scores.device)
    finite = scores.isfinite()
    lowest = torch.where(finite, scores, torch.inf).amin((1, 2))
    scores = torch.where(finite, scores, lowest[:, None, None])
    step = epsilon * (scores.amax((1, 2)) - lowest).clamp_min(torch.finfo(scores.dtype).eps)
    group = torch.arange(groups, device=scores.device).repeat_interleave(size)
    places = ((valid.sum(1) + experts - 1) // experts)[group]
    scores, counted = scores.flatten(0, 1), valid.flatten()
    price = torch.zeros(groups, experts, dtype=scores.dtype, device=scores.device)
    held = torch.full_like(group, -1)  # which expert of all groups, group * E + expert
    bid = torch.zeros_like(scores[:, 0])
    while True:
        waiting = (counted & (held < 0)).nonzero()[:, 0]
        if not waiting.numel():
            return (held % experts).where(counted, 0).view(groups, size)
        its_group = group[waiting]
        worth = (scores[waiting] - price[its_group]).topk(2, dim=1)
        chosen = worth.indices[:, 0]
        bid[waiting] = price[its_group, chosen] + worth.values[:, 0] - worth.values[:, 1] + step[its_group]
        held[waiting] = its_group * experts + chosen
        place = place_in_queue(held, bid.argsort(descending=True, stable=True))
        held = torch.where(place < places, held, -1)
        dearest = (held >= 0) & (place == places - 1)
        price.view(-1)[held[dearest]] = bid[dearest]
