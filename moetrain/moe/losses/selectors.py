"""Terms of gates made of smooth selectors (DSelect-k 2106.03760, COMET 2306.02824). None of them looks at loads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moetrain.config import Component, setting
from moetrain.errors import Problem
from moetrain.moe.context import RouterContext
from moetrain.moe.losses.base import Loss, mean_over_tokens
from moetrain.moe.routing import Routing
from moetrain.registry import register


class AuxConfig(Component):
    """The loss is a figure that the router computes: its name in the routing's ``aux`` is that of the loss."""

    coefficient: float

    def check(self, path: str, *, num_experts: int, router: Any) -> Iterable[Problem]:
        if self.kind not in getattr(router, "provides", frozenset()):
            yield Problem(path, self.kind, f"needs a router that states its {self.kind.replace('_', ' ')}, see moetrain list routers")

    def build(self) -> AuxLoss:
        return AuxLoss(self.kind, coefficient=self.coefficient)


class AuxLoss(Loss):
    """Mean over the valid tokens of a figure per token [T], or the figure itself if it is one for all [ ]."""

    def __init__(self, name: str, *, coefficient: float) -> None:
        super().__init__(coefficient=coefficient, scope="token")
        self.name = name

    def forward(self, routing: Routing, ctx: RouterContext) -> Tensor:
        values = routing.aux[self.name]
        return mean_over_tokens(values, ctx) if values.ndim else values


@register("loss", "selector_entropy", source="DSelect-k 2106.03760, COMET 2306.02824")
@dataclass(kw_only=True)
class SelectorEntropyConfig(AuxConfig):
    """Mean over tokens of the summed entropy of their k selectors (nats); 0 when decided, k log E when even."""

    coefficient: float = setting(0.01, doc="weight; DSelect-k's code 1e-6, COMET-BERT 0.05 to 10", ge=0)


@register("loss", "trapped_experts", source="DSelect-k 2106.03760")
@dataclass(kw_only=True)
class TrappedExpertsConfig(AuxConfig):
    """Mean over tokens of sum over selectors of 1 / (mass on codes that mean an expert); k if E is a power of two."""

    coefficient: float = setting(0.01, doc="weight of the loss", ge=0)


@register("loss", "permutation_entropy", source="COMET 2306.02824, released code")
@dataclass(kw_only=True)
class PermutationEntropyConfig(AuxConfig):
    """Entropy of the soft permutations, entries and rows, mean over trees (nats); 0 for permutations, at most 2 E log E."""

    coefficient: float = setting(1e-4, doc="weight; released 1e-4", ge=0)
