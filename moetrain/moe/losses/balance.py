"""Load-balance losses: sum over experts of f_e * P_e, f_e the share of choices (no gradient), P_e the mean probability.

They differ in what counts as a choice, over which tokens the means run and how f is normalised. With one choice per
token all are 1 at perfect balance, with several all but ``normalisation=per_token`` and ``gate_balance``.
Sources: GShard (2006.16668), Switch (2101.03961 eq. 4-6), DeepSeekMoE (2401.06066 eq. 12-17), DeepSeek-V2 (2405.04434
eq. 23-31), DeepSeek-V3 (2412.19437 eq. 17-20), Qwen's global-batch loss (2501.11873), EvoMoE (2112.14397), AdaMoE's of
null experts (2406.13233).
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
from moetrain.moe.experts.zero import count_zero_experts
from moetrain.moe.losses.base import GroupSums, Loss, sum_by_group
from moetrain.moe.routing import PAD, Routing
from moetrain.registry import register

BalanceScope = Literal["sequence", "micro_step", "rank"]
_SCOPE_DOC = "token group of the means: each sequence; all tokens that all ranks process together; this rank's tokens"


@register("loss", "switch_balance", source="GShard 2006.16668, Switch 2101.03961 eq. 4")
@dataclass(kw_only=True)
class SwitchBalanceConfig(Component):
    """E * sum_e f_e P_e with f the share of FIRST choices; 1 at perfect balance."""

    coefficient: float = setting(0.01, doc="weight of the loss; GShard, Switch and GLaM 0.01", ge=0)
    scope: BalanceScope = setting("sequence", doc=_SCOPE_DOC)
    num_groups: int = setting(1, doc="with scope=rank: equal groups that the rank's tokens are cut into", ge=1)

    def problems(self, path: str) -> Iterable[Problem]:
        if self.num_groups > 1 and self.scope != "rank":
            yield Problem(f"{path}.num_groups", self.num_groups, f"needs {path}.scope=rank")

    def build(self) -> SwitchBalance:
        return SwitchBalance(self)


class SwitchBalance(Loss):
    def __init__(self, config: SwitchBalanceConfig) -> None:
        super().__init__(coefficient=config.coefficient, scope=config.scope)
        self.num_groups = config.num_groups

    def forward(self, routing: Routing, ctx: RouterContext) -> Tensor:
        first = torch.where(routing.slot == 0, routing.expert, PAD)
        sums = GroupSums(routing, ctx, self.scope, expert=first, num_groups=self.num_groups)
        tokens = sums.tokens.clamp_min(1)[:, None]
        product = (sums.counts / tokens) * (sums.probs / tokens)
        return sums.mean_over_groups(product.sum(1) * sums.counts.shape[1])


@register("loss", "expert_balance", source="DeepSeekMoE 2401.06066 eq. 12-14, DeepSeek-V3 2412.19437 eq. 17-20, Qwen 2501.11873")
@dataclass(kw_only=True)
class ExpertBalanceConfig(Component):
    """sum_e f_e P_e with f_e = E * choices of e / all choices; 1 at perfect balance."""

    coefficient: float = setting(0.001, doc="weight; DeepSeekMoE 2B 0.01 and 16B 0.001, V3 1e-4", ge=0)
    scope: BalanceScope = setting("sequence", doc=_SCOPE_DOC)
    choices: Literal["selected", "unbiased"] = setting(
        "selected", doc="unbiased: the top-K by probability, without selection bias and group limit (V3)"
    )
    normalisation: Literal["per_choice", "per_token"] = setting(
        "per_choice", doc="f relative to all choices (value 1 at balance), or to the T tokens (value K; Mixtral in transformers)"
    )

    pool_zero: bool = setting(False, doc="zero-computation experts share the mean of their choices: only their total is balanced (AdaMoE)")

    def build(self) -> ExpertBalance:
        return ExpertBalance(self)

    def check(self, path: str, *, num_experts: int, router: Any) -> Iterable[Problem]:
        if self.pool_zero and not count_zero_experts(router):
            yield Problem(f"{path}.pool_zero", True, "needs a router with zero_experts")
        if self.choices == "unbiased" and getattr(router, "top_k", None) is None:
            yield Problem(f"{path}.choices", self.choices, "needs a router with a fixed top_k")


class ExpertBalance(Loss):
    def __init__(self, config: ExpertBalanceConfig) -> None:
        super().__init__(coefficient=config.coefficient, scope=config.scope)
        self.config = config

    def forward(self, routing: Routing, ctx: RouterContext) -> Tensor:
        fraction, sums = self.fractions(routing, ctx)
        value = (fraction * sums.probs / sums.tokens.clamp_min(1)[:, None]).sum(1)
        return sums.mean_over_groups(value)

    def fractions(self, routing: Routing, ctx: RouterContext) -> tuple[Tensor, GroupSums]:
        """f [G, E] and the sums it was made from."""
        expert = token = None
        if self.config.choices == "unbiased":
            expert, token = unbiased_choices(routing, ctx)
        sums = GroupSums(routing, ctx, self.scope, expert=expert, token=token)
        counts = sums.counts
        if self.config.pool_zero:
            zero = counts[:, routing.num_experts :]
            counts = torch.cat([counts[:, : routing.num_experts], zero.mean(dim=1, keepdim=True).expand_as(zero)], dim=1)
        units = counts.sum(1) if self.config.normalisation == "per_choice" else sums.tokens
        return counts * counts.shape[1] / units.clamp_min(1)[:, None], sums


def unbiased_choices(routing: Routing, ctx: RouterContext) -> tuple[Tensor, Tensor]:
    """(expert, token), each [T * K]: the top-K of the probabilities themselves; PAD where the token is not valid."""
    assert routing.probs is not None and routing.top_k is not None
    top_k, probs = routing.top_k, routing.probs.detach()
    expert = ctx.once("unbiased", lambda: probs.topk(top_k, dim=1).indices)
    if ctx.valid is not None:
        expert = torch.where(ctx.valid[:, None], expert, PAD)
    return expert.reshape(-1), torch.arange(probs.shape[0], device=probs.device).repeat_interleave(top_k)


@register("loss", "device_balance", source="DeepSeekMoE 2401.06066 eq. 15-17")
@dataclass(kw_only=True)
class DeviceBalanceConfig(Component):
    """sum_d f'_d P'_d over logical devices: f' the mean of f over a device's experts, P' the sum of P; 1 at balance."""

    coefficient: float = setting(0.05, doc="weight; DeepSeekMoE 145B and V2 0.05", ge=0)
    num_devices: int = setting(doc="logical devices; stays fixed when the physical layout changes", ge=1)
    scope: BalanceScope = setting("sequence", doc=_SCOPE_DOC)

    def check(self, path: str, *, num_experts: int, router: Any) -> Iterable[Problem]:
        yield from _fits(f"{path}.num_devices", self.num_devices, num_experts, router)

    def build(self) -> DeviceBalance:
        return DeviceBalance(self)


class DeviceBalance(Loss):
    def __init__(self, config: DeviceBalanceConfig) -> None:
        super().__init__(coefficient=config.coefficient, scope=config.scope)
        self.num_devices = config.num_devices

    def forward(self, routing: Routing, ctx: RouterContext) -> Tensor:
        sums = GroupSums(routing, ctx, self.scope)
        tokens = sums.tokens.clamp_min(1)[:, None]
        fraction = sums.counts * sums.counts.shape[1] / sums.counts.sum(1).clamp_min(1)[:, None]
        by_device = lambda t: t.unflatten(1, (self.num_devices, -1))  # noqa: E731
        value = by_device(fraction).mean(2) * by_device(sums.probs / tokens).sum(2)
        return sums.mean_over_groups(value.sum(1))


@register("loss", "communication_balance", source="DeepSeek-V2 2405.04434 eq. 29-31")
@dataclass(kw_only=True)
class CommunicationBalanceConfig(Component):
    """sum_d f''_d P''_d: f'' = D/(M T) * tokens sent to device d (each counted once), P'' the sum of P; 1 at balance."""

    coefficient: float = setting(0.02, doc="weight; DeepSeek-V2 0.02", ge=0)
    num_devices: int = setting(doc="logical devices; stays fixed when the physical layout changes", ge=1)
    devices_per_token: int = setting(doc="M, devices that a token may use", ge=1)
    scope: BalanceScope = setting("sequence", doc=_SCOPE_DOC)

    def check(self, path: str, *, num_experts: int, router: Any) -> Iterable[Problem]:
        yield from _fits(f"{path}.num_devices", self.num_devices, num_experts, router)

    def build(self) -> CommunicationBalance:
        return CommunicationBalance(self)


class CommunicationBalance(Loss):
    def __init__(self, config: CommunicationBalanceConfig) -> None:
        super().__init__(coefficient=config.coefficient, scope=config.scope)
        self.config = config

    def forward(self, routing: Routing, ctx: RouterContext) -> Tensor:
        sums = GroupSums(routing, ctx, self.scope)
        devices = self.config.num_devices
        tokens = sums.tokens.clamp_min(1)[:, None]
        sent = ctx.reduce(self.tokens_sent(routing, sums.num_groups), self.scope)
        fraction = sent * devices / (self.config.devices_per_token * tokens)
        return sums.mean_over_groups((fraction * (sums.probs / tokens).unflatten(1, (devices, -1)).sum(2)).sum(1))

    def tokens_sent(self, routing: Routing, num_groups: int) -> Tensor:
        """[G, devices]: tokens with at least one expert on the device."""
        assert routing.probs is not None
        devices = self.config.num_devices
        reached = torch.zeros(routing.num_tokens, devices + 1, dtype=routing.probs.dtype, device=routing.probs.device)
        size = routing.probs.shape[1] // devices
        device = torch.where(routing.expert == PAD, devices, routing.expert // size)
        reached[routing.token, device] = 1
        return reached[:, :devices].view(num_groups, -1, devices).sum(1)


@register("loss", "gate_balance", source="EvoMoE 2112.14397")
@dataclass(kw_only=True)
class GateBalanceConfig(Component):
    """E * sum_e (mean weight of e) * (share of tokens that select e); 1 with one choice each at balance, E if dense and even."""

    coefficient: float = setting(0.01, doc="weight of the loss; the number of selected experts scales its push", ge=0)
    scope: BalanceScope = setting("sequence", doc=_SCOPE_DOC)

    def build(self) -> GateBalance:
        return GateBalance(self)


class GateBalance(Loss):
    def __init__(self, config: GateBalanceConfig) -> None:
        super().__init__(coefficient=config.coefficient, scope=config.scope)

    def forward(self, routing: Routing, ctx: RouterContext) -> Tensor:
        sums = GroupSums(routing, ctx, self.scope)
        weights = routing.weight.new_zeros(routing.num_tokens, routing.selected.numel())
        real = routing.expert.clamp_min(0)  # PAD entries weigh nothing
        weights = weights.index_put((routing.token, real), routing.weight, accumulate=True)
        tokens = sums.tokens.clamp_min(1)[:, None]
        product = sums.counts / tokens * sum_by_group(weights, ctx, self.scope) / tokens
        return sums.mean_over_groups(product.sum(1) * sums.counts.shape[1])


def _fits(field: str, value: int, num_experts: int, router: Any) -> Iterable[Problem]:
    if num_experts % value:
        yield Problem(field, value, f"must divide the {num_experts} experts")
    if count_zero_experts(router):
        yield Problem(field, value, "needs a router without zero_experts: zero-computation experts are on no device")
