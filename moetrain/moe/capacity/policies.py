"""Capacity policies: dropless, slots per expert and token group, a budget per device.

Slots: GShard (2006.16668), Switch (2101.03961), GLaM (2112.06905), batch-prioritised routing (V-MoE
2106.05974), random token selection (Z-code M3 2109.10465); the order of dropping and the rounding follow fairseq's,
DeepSpeed's, Tutel's and Megatron-Core's routers. Device budget: DeepSeek-V2 (2405.04434 section 2.2.4).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moetrain.config import Component, setting
from moetrain.errors import Problem
from moetrain.moe.context import RouterContext, Scope
from moetrain.moe.routing import PAD, Routing
from moetrain.moe.schedules import Course, scheduled_value
from moetrain.registry import register


class Capacity(nn.Module):
    """Maps a routing to the one that is executed: entries without room become PAD."""

    def forward(self, routing: Routing, ctx: RouterContext) -> Routing:
        raise NotImplementedError


@register("capacity", "none", source="MegaBlocks 2211.15841")
@dataclass(kw_only=True)
class DroplessConfig(Component):
    """Dropless: every expert takes all tokens that chose it."""

    def build(self) -> Dropless:
        return Dropless()


class Dropless(Capacity):
    def forward(self, routing: Routing, ctx: RouterContext) -> Routing:
        return routing


@register("capacity", "slots", source="GShard 2006.16668, Switch 2101.03961, GLaM 2112.06905, V-MoE 2106.05974, Z-code M3 2109.10465")
@dataclass(kw_only=True)
class SlotsConfig(Component):
    """Each expert has C slots per token group; what finds no slot is dropped (the residual stream goes on)."""

    factor: float = setting(1.25, doc="capacity factor: C = factor * (choices per token) * (tokens of the group) / E", gt=0)
    factor_start: float | None = setting(
        None,
        doc="capacity factor in the first step, on the way to factor, which holds in evaluation; default: factor",
        gt=0,
        schedule="Tutel 2206.03382 (adaptive capacity)",
    )
    factor_schedule: Course = setting("linear", doc="the way from factor_start to factor")
    choices: int | None = setting(
        None, doc="choices per token in that formula; default: the router's K, or the group's mean, rounded. GLaM 1, factor 2", ge=1
    )
    tokens: int | None = setting(None, doc="fixed C in tokens, instead of the formula", ge=1)
    round: Literal["up", "down", "per_choice"] = setting(
        "up", doc="rounding of C to an integer; per_choice: C = choices * floor(factor * ceil(tokens / E)) (Tutel, fairseq)"
    )
    minimum: int = setting(1, doc="C is at least this; DeepSpeed 4", ge=1)
    multiple: int = setting(1, doc="C is rounded up to a multiple of this, e.g. of the chunks of a pipeline; GLaM 4", ge=1)
    scope: Literal["sequence", "rank"] = setting(
        "sequence", doc="token group: each sequence, or the rank's micro-batch (depends on the layout)"
    )
    num_groups: int = setting(1, doc="with scope=rank: equal groups that the rank's tokens are cut into", ge=1)
    priority: Literal["position", "probability", "first_probability", "token", "random"] = setting(
        "position",
        doc="who gets the slots: first choices before second ones, each in token order; largest weights; "
        "first choices before second ones, each by the token's best probability (batch-prioritised); "
        "token order, whichever choice it is; largest random draws (random token selection, also in evaluation)",
    )
    renormalise: bool = setting(False, doc="divide the kept weights of a token by their sum (normalise after dropping)")
    evaluation: Literal["same", "none"] = setting("same", doc="capacity during evaluation and generation")
    evaluation_fraction: float | None = setting(None, doc="evaluation: C = ceil(fraction * tokens of the group); fairseq 0.25", gt=0)

    def problems(self, path: str) -> Iterable[Problem]:
        if self.num_groups > 1 and self.scope != "rank":
            yield Problem(f"{path}.num_groups", self.num_groups, f"needs {path}.scope=rank; a sequence is one group")
        if self.factor_start is None and self.factor_schedule != "linear":
            yield Problem(f"{path}.factor_schedule", self.factor_schedule, f"needs {path}.factor_start")
        if self.factor_start is not None and self.tokens is not None:
            yield Problem(f"{path}.factor_start", self.factor_start, f"has no effect: {path}.tokens fixes C")

    def build(self) -> Slots:
        return Slots(self)


class Slots(Capacity):
    """See :class:`SlotsConfig`."""

    def __init__(self, config: SlotsConfig) -> None:
        super().__init__()
        self.config = config

    def factor(self, ctx: RouterContext) -> float:
        """The present capacity factor."""
        config = self.config
        if config.factor_start is None or not ctx.training:
            return config.factor
        return scheduled_value(config.factor_start, config.factor, ctx.step, ctx.total_steps, config.factor_schedule)

    def capacity(self, group_size: int, top_k: int, num_experts: float, *, training: bool, factor: float | None = None) -> int:
        """C, slots per expert and group of ``group_size`` tokens. factor: default, the setting."""
        config = self.config
        factor = config.factor if factor is None else factor
        if config.evaluation_fraction is not None and not training:
            slots = math.ceil(config.evaluation_fraction * group_size)
        elif config.tokens is not None:
            slots = config.tokens
        else:
            choices = config.choices or top_k
            exact = factor * choices * group_size / num_experts
            slots = {
                "up": math.ceil(exact),
                "down": int(exact),
                "per_choice": choices * int(factor * math.ceil(group_size / num_experts)),
            }[config.round]
        return math.ceil(max(slots, config.minimum) / config.multiple) * config.multiple

    def forward(self, routing: Routing, ctx: RouterContext) -> Routing:
        config = self.config
        if config.evaluation == "none" and not ctx.training:
            return routing
        groups = ctx.batch_size if config.scope == "sequence" else config.num_groups
        group_size = max(1, routing.num_tokens // groups)  # decoding runs one token at a time
        kept = ctx.once("capacity", lambda: self.kept(routing, ctx, group_size=group_size))
        weight = None
        if config.renormalise:
            weight = torch.where(kept, routing.weight, 0.0)
            total = torch.zeros(routing.num_tokens, dtype=weight.dtype, device=weight.device).index_add(0, routing.token, weight)
            weight = weight / total.clamp_min(torch.finfo(weight.dtype).eps)[routing.token]
        return routing.keep(kept, weight)

    def kept(self, routing: Routing, ctx: RouterContext, *, group_size: int) -> Tensor:
        """[N] bool: entries that get a slot. PAD entries do not; zero-computation experts need none."""
        experts = routing.num_experts
        real = (routing.expert != PAD) & (routing.expert < experts)
        slots = self.slots(routing, ctx, experts, group_size=group_size)
        return (real & (self.places(routing, ctx, group_size=group_size) < slots)) | (routing.expert >= experts)

    def slots(self, routing: Routing, ctx: RouterContext, num_experts: float, *, group_size: int) -> int | Tensor:
        """C: one number, or that of each entry's group [N] where tokens make different numbers of choices. A group's C then
        follows from its own choices, rounded to whole ones per token: those of other groups depend on the layout."""
        factor = self.factor(ctx)
        if routing.top_k is not None or self.config.choices is not None:
            return self.capacity(group_size, routing.top_k or 0, num_experts, training=ctx.training, factor=factor)
        group = routing.token // group_size
        entries = torch.bincount(group[routing.expert != PAD], minlength=-(-routing.num_tokens // group_size))
        per_token = (entries / group_size).round().clamp_min(1).tolist()
        by_group = [self.capacity(group_size, int(k), num_experts, training=ctx.training, factor=factor) for k in per_token]
        return torch.tensor(by_group, device=group.device)[group]

    def places(self, routing: Routing, ctx: RouterContext, *, group_size: int) -> Tensor:
        """[N] int64: how many entries for the same expert and group are served before each entry."""
        experts = routing.num_experts
        real = (routing.expert != PAD) & (routing.expert < experts)
        queue = torch.where(real, (routing.token // group_size) * experts + routing.expert, -1)
        return place_in_queue(queue, self.priority(routing, ctx))

    def priority(self, routing: Routing, ctx: RouterContext) -> Tensor:
        """Permutation [N] of the entries, those served first in front. Ties keep the token order."""
        token, kind = routing.token, self.config.priority
        if kind == "token":
            return token.argsort(stable=True)
        if kind == "probability":
            return routing.weight.argsort(descending=True, stable=True)
        if kind == "random":
            draws = ctx.uniform("random_token_selection", routing.selected.numel(), device=token.device)
            return draws[token, routing.expert.clamp_min(0)].argsort(descending=True, stable=True)
        order = torch.arange(token.numel(), device=token.device)
        if kind == "first_probability":
            assert routing.probs is not None, "batch-prioritised routing needs the router's probabilities"
            order = routing.probs.max(dim=1).values[token].argsort(descending=True, stable=True)
        return order[routing.slot[order].argsort(stable=True)]


@register("capacity", "device_budget", source="DeepSeek-V2 2405.04434 section 2.2.4")
@dataclass(kw_only=True)
class DeviceBudgetConfig(Component):
    """In training each logical device computes at most its average share of the rank's choices, best weights first.

    The token group is the rank's micro-batch: what is dropped depends on the layout. Nothing is dropped in evaluation.
    """

    scope: ClassVar[Scope] = "rank"
    num_devices: int = setting(doc="logical devices, equal runs of neighbouring experts; fixed when the physical layout changes", ge=1)
    factor: float = setting(1.0, doc="budget of a device = factor * choices / num_devices, rounded down", gt=0)
    exempt_fraction: float = setting(0.0, doc="share of sequences never dropped; they use up budget first (DeepSeek-V2 0.1)", ge=0, le=1)

    def check(self, path: str, *, num_experts: int, router: Any) -> Iterable[Problem]:
        if num_experts % self.num_devices:
            yield Problem(f"{path}.num_devices", self.num_devices, f"must divide the {num_experts} experts")

    def build(self) -> DeviceBudget:
        return DeviceBudget(self)


class DeviceBudget(Capacity):
    """See :class:`DeviceBudgetConfig`. The paper does not say how exempt sequences count; here they use up budget."""

    def __init__(self, config: DeviceBudgetConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, routing: Routing, ctx: RouterContext) -> Routing:
        if not ctx.training:
            return routing
        return routing.keep(ctx.once("capacity", lambda: self.kept(routing, self.exempt(ctx, routing.token.device))))

    def exempt(self, ctx: RouterContext, device: torch.device) -> Tensor | None:
        """[T] bool, tokens of the exempt sequences; None if there are none."""
        if not self.config.exempt_fraction:
            return None
        per_token = ctx.uniform("exempt", 1, device=device).view(ctx.batch_size, ctx.seq_len)
        return (per_token[:, :1] < self.config.exempt_fraction).expand_as(per_token).reshape(-1)

    def kept(self, routing: Routing, exempt: Tensor | None = None) -> Tensor:
        """[N] bool: entries within their device's budget, and those of the ``exempt`` [T] tokens."""
        experts, devices = routing.num_experts, self.config.num_devices
        real = (routing.expert != PAD) & (routing.expert < experts)
        spared = torch.zeros_like(real) if exempt is None else exempt[routing.token]
        budget = (real.sum().double() * self.config.factor / devices).floor()
        order = routing.weight.argsort(descending=True, stable=True)
        order = order[spared[order].logical_not().to(torch.uint8).argsort(stable=True)]
        place = place_in_queue(torch.where(real, routing.expert // (experts // devices), -1), order)
        return (real & (spared | (place < budget))) | (routing.expert >= experts)


def place_in_queue(queue: Tensor, order: Tensor) -> Tensor:
    """[N] int64: how many entries of the same queue come before each entry. queue: [N] int64 queue of an entry;
    order: permutation [N] of the entries, those served first in front."""
    order = order[queue[order].argsort(stable=True)]
    ranked = queue[order]
    start = torch.searchsorted(ranked, ranked)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device) - start
    return place
