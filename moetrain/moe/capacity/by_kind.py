"""Capacity by kind of expert (MoE++, 2410.07348 eq. 8): zero-computation experts have 1 / tau the slots of the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetrain.config import setting
from moetrain.errors import Problem
from moetrain.moe.capacity.policies import Slots, SlotsConfig, place_in_queue
from moetrain.moe.context import RouterContext
from moetrain.moe.experts.zero import count_zero_experts
from moetrain.moe.routing import PAD, Routing
from moetrain.registry import register


@register("capacity", "slots_by_kind", source="MoE++ 2410.07348 eq. 8")
@dataclass(kw_only=True)
class SlotsByKindConfig(SlotsConfig):
    """C = factor * choices * tokens / (tau E + Z) for each of Z zero-computation experts, tau times that for each of E others.

    The equation as printed has choices = 1, although a token makes K; otherwise the settings of slots.
    """

    factor: float = setting(1.1, doc="capacity factor gamma; MoE++ 1.1", gt=0)
    tau: float = setting(0.75, doc="slots of an expert relative to a zero-computation one; MoE++ 0.75, 0.1 to 1", gt=0, le=1)
    limit_zero: bool = setting(True, doc="false: zero-computation experts drop nothing, as it would save nothing")

    def check(self, path: str, *, num_experts: int, router: Any) -> Iterable[Problem]:
        if not count_zero_experts(router):
            yield Problem(path, self.kind, "needs a router with zero_experts; capacity=slots otherwise")

    def build(self) -> SlotsByKind:
        return SlotsByKind(self)


class SlotsByKind(Slots):
    """See :class:`SlotsByKindConfig`."""

    config: SlotsByKindConfig

    def kept(self, routing: Routing, ctx: RouterContext, *, group_size: int) -> Tensor:
        columns, experts = routing.selected.numel(), routing.num_experts
        divisors = self.divisors(experts, columns - experts)
        of_expert, of_zero = (self.slots(routing, ctx, divisor, group_size=group_size) for divisor in divisors)
        real = routing.expert < experts
        queue = torch.where(routing.expert != PAD, (routing.token // group_size) * columns + routing.expert, -1)
        place = place_in_queue(queue, self.priority(routing, ctx))
        room = (place < torch.where(real, of_expert, of_zero)) | (~real if not self.config.limit_zero else False)
        return (routing.expert != PAD) & room

    def divisors(self, num_experts: int, num_zero: int) -> tuple[float, float]:
        """What choices are divided by for an expert and for a zero-computation one, instead of their number."""
        total = self.config.tau * num_experts + num_zero
        return total / self.config.tau, total
