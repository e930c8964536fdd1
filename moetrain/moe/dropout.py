"""Dropout of routes: in training some of the chosen experts are left out, before capacity counts.

Losses and selection biases see what the router chose, whatever is dropped here. Draws belong to a token and an expert, so a
layout changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moetrain.config import Component, setting
from moetrain.moe.context import Granularity, RouterContext
from moetrain.moe.routing import Routing
from moetrain.registry import register


class RouteDropout:
    """Maps a routing to one in which dropped entries are PAD. rescale: factor on the weights of the others."""

    rescale: float = 1.0

    def __call__(self, routing: Routing, ctx: RouterContext, name: str) -> Routing:
        """name: of this dropout in its layer, which tells its draws from those of others."""
        if not ctx.training:
            return routing
        site = f"dropout/{name}"
        kept = ctx.once(site, lambda: self.kept(routing, ctx, site))
        return routing.keep(kept, None if self.rescale == 1.0 else routing.weight * self.rescale)

    def kept(self, routing: Routing, ctx: RouterContext, site: str) -> Tensor:
        """[N] bool: entries that stay."""
        raise NotImplementedError


def draw(routing: Routing, ctx: RouterContext, site: str, per: Granularity = "token") -> Tensor:
    """[N] uniform numbers, one for each token (or sequence, or pass) and expert."""
    draws = ctx.uniform(site, routing.selected.numel(), per=per, device=routing.expert.device)
    return draws[routing.token, routing.expert.clamp_min(0)]


@register("dropout", "random_second", source="GShard 2006.16668 algorithm 1")
@dataclass(kw_only=True)
class RandomSecondConfig(Component):
    """A choice after the first stays with a chance proportional to its weight: min(1, factor * weight).

    The weight is the router's: renormalised as in GShard if router.renormalise=true; else (with capacity.renormalise=true) the
    raw probability, as fairseq's gate with normalisation after dropping.
    """

    factor: float = setting(2.0, doc="of the weight in that chance; GShard, for two experts per token: 2", gt=0)

    def build(self) -> RandomSecond:
        return RandomSecond(self)


class RandomSecond(RouteDropout):
    """See :class:`RandomSecondConfig`."""

    def __init__(self, config: RandomSecondConfig) -> None:
        self.factor = config.factor

    def kept(self, routing: Routing, ctx: RouterContext, site: str) -> Tensor:
        return (routing.slot == 0) | (self.factor * routing.weight > draw(routing, ctx, site))


@register("dropout", "expert_dropout", source="NLLB 2207.04672 (expert output masking)")
@dataclass(kw_only=True)
class ExpertDropoutConfig(Component):
    """Experts are left out at random: for single tokens (NLLB's expert output masking), for sequences, or for the whole step.

    It acts on an expert's output. Switch's expert dropout (2101.03961), inside the experts, is another thing.
    """

    rate: float = setting(0.2, doc="chance of each choice to be left out; fairseq's NLLB-200 script 0.2", ge=0, lt=1)
    per: Granularity = setting("token", doc="what draws of its own; pass: an expert is there for all tokens of a step or for none")
    rescale: bool = setting(True, doc="divide the weights of what stays by 1 - rate, as dropout does")

    def build(self) -> ExpertDropout:
        return ExpertDropout(self)


class ExpertDropout(RouteDropout):
    """See :class:`ExpertDropoutConfig`. Zero-computation experts stay."""

    def __init__(self, config: ExpertDropoutConfig) -> None:
        self.config = config
        self.rescale = 1 / (1 - config.rate) if config.rescale else 1.0

    def kept(self, routing: Routing, ctx: RouterContext, site: str) -> Tensor:
        return (draw(routing, ctx, site, self.config.per) >= self.config.rate) | (routing.expert >= routing.num_experts)


@register("dropout", "gating_dropout", source="Gating dropout 2205.14336 (Gate-Expert-Drop)")
@dataclass(kw_only=True)
class GatingDropoutConfig(Component):
    """In some steps no token of a layer takes a routed expert: nothing is sent or computed, the residual stream goes on.

    Each MoE layer draws for itself, once per step. The paper's other form, in which tokens stay with the experts of their
    machine, is not there: it depends on the layout.
    """

    rate: float = setting(0.2, doc="chance of a layer to be left out of a step", ge=0, lt=1)

    def build(self) -> GatingDropout:
        return GatingDropout(self)


class GatingDropout(RouteDropout):
    """See :class:`GatingDropoutConfig`."""

    def __init__(self, config: GatingDropoutConfig) -> None:
        self.rate = config.rate

    def kept(self, routing: Routing, ctx: RouterContext, site: str) -> Tensor:
        draws = ctx.uniform(site, 1, per="pass", device=routing.expert.device)[:, 0]
        return draws[routing.token] >= self.rate
