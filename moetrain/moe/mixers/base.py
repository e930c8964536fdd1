"""How the output of an MoE layer enters the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from moetrain.config import Component
from moetrain.moe.context import RouterContext
from moetrain.registry import register


class Mixer(nn.Module):
    """forward(x, y, ctx) -> x', all of one shape: x the residual stream in front of the MoE layer, y the layer's output.

    State that travels from MoE layer to MoE layer is in ``ctx.carry``; entries are replaced, never changed in place.
    """

    def look_ahead(self, x: Tensor, ctx: RouterContext) -> Tensor:
        """Where the MoE layer is evaluated, before its norm; x unless the rule extrapolates."""
        return x

    def forward(self, x: Tensor, y: Tensor, ctx: RouterContext) -> Tensor:
        raise NotImplementedError


@register("mixer", "residual")
@dataclass(kw_only=True)
class ResidualConfig(Component):
    """x + y."""

    def build(self) -> Residual:
        return Residual()


class Residual(Mixer):
    """The plain residual sum."""

    def forward(self, x: Tensor, y: Tensor, ctx: RouterContext) -> Tensor:
        return x + y
