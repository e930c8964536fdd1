"""DSelect-k (2106.03760): k selectors, each a smooth binary code of one expert, mixed by a softmax."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moetrain.config import setting
from moetrain.errors import Problem
from moetrain.moe.context import RouterContext
from moetrain.moe.routers.base import LearnedRouterConfig, Router, at_least_float32, uniform
from moetrain.moe.routers.comet import LEAF_BOUND, entropy
from moetrain.moe.routing import Routing, ragged_routing
from moetrain.ops.smooth_step import smooth_step
from moetrain.registry import register

LEAST_MASS = 1e-6
"""Lower bound of a selector's mass on experts in the trapped-expert term, which is infinite without."""


@register("router", "dselect_k", source="DSelect-k 2106.03760")
@dataclass(kw_only=True)
class DSelectRouterConfig(LearnedRouterConfig):
    """Smooth binary codes select experts; all with a non-zero gate take part, at most k once the codes are decided.

    The codes are exact for a power of two; else some mean no expert, and loss=trapped_experts keeps mass on the others.
    """

    num_selectors: int = setting(doc="k, selectors; experts per token at the end", ge=1, follows="model.top_k")
    width: float = setting(1.0, doc="gamma, width of the band in which a bit is soft", gt=0)
    static: bool = setting(False, doc="one gate for all tokens")

    lacks: ClassVar = frozenset({"logits"})

    @property
    def provides(self) -> frozenset[str]:
        """Names that a routing has in ``aux`` in training."""
        return frozenset({"selector_entropy", "trapped_experts"})

    def check(self, path: str, *, num_experts: int) -> Iterable[Problem]:
        """Rules that involve the number of experts."""
        if num_experts < 2:
            yield Problem(path, self.kind, "needs at least two experts: a code needs a bit")

    def make(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> DSelectRouter:
        return DSelectRouter(self, hidden_size, num_experts, dtype=dtype)


class DSelectRouter(Router):
    """See :class:`DSelectRouterConfig`. m = ceil(log2 E) bits.

    code_weight: [k m, D] with code_bias [k m], selectors outside, bits inside. mixture_weight: [k, D] with mixture_bias [k].
    A static gate has the biases alone.
    """

    def __init__(self, config: DSelectRouterConfig, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.bits = math.ceil(math.log2(num_experts))
        selectors, codes, start = config.num_selectors, config.num_selectors * self.bits, config.width / 100
        self.code_weight = None if config.static else nn.Parameter(torch.empty(codes, hidden_size, dtype=dtype))
        self.mixture_weight = None if config.static else nn.Parameter(torch.empty(selectors, hidden_size, dtype=dtype))
        self.code_bias = nn.Parameter(torch.empty(codes, dtype=dtype))
        self.mixture_bias = nn.Parameter(torch.empty(selectors, dtype=dtype))
        drawn = "bias" if config.static else "weight"
        self.initial = {"code_bias": 0.0, "mixture_bias": 0.0}
        self.initial |= {f"code_{drawn}": uniform(start), f"mixture_{drawn}": uniform(LEAF_BOUND)}

    def forward(self, x: Tensor, ctx: RouterContext) -> Routing:
        """x: [T, D] -> ragged Routing."""
        x = at_least_float32(x)
        selectors = self.selectors(x)
        mixture = torch.softmax(affine(x, self.mixture_weight, self.mixture_bias), dim=1)
        gates = torch.einsum("tk,tke->te", mixture, selectors)
        aux = {}
        if ctx.training:
            mass = selectors.sum(dim=2).clamp_min(LEAST_MASS)
            aux = {"selector_entropy": entropy(selectors).sum(dim=(1, 2)), "trapped_experts": mass.reciprocal().sum(dim=1)}
        probs = gates / gates.sum(dim=1, keepdim=True).clamp_min(LEAST_MASS)
        selected = ctx.once("select", lambda: gates > 0)
        return ragged_routing(selected, gates, num_experts=self.num_experts, probs=probs, valid=ctx.valid, aux=aux)

    def selectors(self, x: Tensor) -> Tensor:
        """[T, k, E] share of each expert in each selector: the product over the bits of its number."""
        codes = affine(x, self.code_weight, self.code_bias).unflatten(1, (-1, self.bits))
        ones = smooth_step(codes, self.config.width)
        share = torch.ones_like(ones[:, :, :1])
        for one in ones.split(1, dim=2):  # most significant bit first
            share = torch.stack([share * (1 - one), share * one], dim=3).flatten(2)
        return share[:, :, : self.num_experts]


def affine(x: Tensor, weight: Tensor | None, bias: Tensor) -> Tensor:
    """x W^T + b; without W the bias for every row of x."""
    bias = bias.to(x.dtype)
    return bias.expand(x.shape[0], -1) if weight is None else nn.functional.linear(x, weight.to(x.dtype), bias)
