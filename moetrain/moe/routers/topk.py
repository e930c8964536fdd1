"""The top-k router: one pipeline that covers the linear routers of the public models.

(noise) -> score -> (selection bias) -> (group limit) -> top-k or sampling -> weights -> (renormalise) -> scale.
Sources: Switch (2101.03961), GShard (2006.16668), DeepSpeed-MoE (2201.05596), Tutel (2206.03382), DeepSeekMoE
(2401.06066 eq. 9-11), DeepSeek-V2 (2405.04434 section 2.2.2), DeepSeek-V3 (2412.19437 eq. 12-16), and the models
named in ``configs/router``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moetrain.config import setting
from moetrain.errors import Problem
from moetrain.moe.context import LayerStatistics, RouterContext
from moetrain.moe.experts.zero import ZeroExpertsConfig
from moetrain.moe.routers.base import LearnedRouterConfig, LinearRouter
from moetrain.moe.routing import Routing, fixed_routing
from moetrain.moe.schedules import Course, TopKSchedule, scheduled_top_k, scheduled_value
from moetrain.ops import noise
from moetrain.registry import register

LINEAR_BELOW = -40.0
"""log(softplus(z)) is z to double precision from here on."""

Score = Literal["softmax", "sigmoid", "sqrt_softplus", "logit"]


@register("router", "topk", source="Switch 2101.03961, GShard 2006.16668, DeepSeek-V3 2412.19437 eq. 12-16")
@dataclass(kw_only=True)
class TopKRouterConfig(LearnedRouterConfig):
    """Linear router: each token takes its K best experts."""

    top_k: int = setting(doc="experts per token", ge=1, follows="model.top_k")
    top_k_start: int | None = setting(
        None,
        doc="experts per token in the first step, on the way to top_k; default: top_k",
        ge=1,
        schedule="SMoE-Dropout 2303.01610",
    )
    top_k_schedule: TopKSchedule = setting("linear", doc="the way from top_k_start to top_k (SMoE-Dropout); step: doubled or halved")
    score: Score = setting("softmax", doc="affinity from the logits; softmax is over all experts")
    temperature: float = setting(1.0, doc="divides the logits (after soft cap and noise) in scores and probabilities", gt=0)
    temperature_start: float | None = setting(
        None,
        doc="temperature in the first step, on the way to temperature (annealed gate); default: temperature",
        gt=0,
        schedule="EvoMoE 2112.14397",
    )
    temperature_schedule: Course = setting("exponential", doc="the way from temperature_start to temperature")
    selected_softmax: bool = setting(False, doc="weights are the softmax over the K selected scores (GPT-OSS, Granite, JetMoE)")
    renormalise: bool = setting(False, doc="divide the K weights of a token by their sum")
    renormalise_epsilon: float = setting(0.0, doc="added to that sum; DeepSeek-V3 1e-20, GLaM 1e-9", ge=0)
    renormalise_minimum: float = setting(0.0, doc="lower bound of that sum; Ernie-4.5 1e-12", ge=0)
    scale: float = setting(1.0, doc="factor on all weights (routed_scaling_factor)", gt=0)
    num_groups: int = setting(1, doc="groups (nodes, devices) that the experts are cut into; 1: no group limit", ge=1)
    groups_per_token: int = setting(1, doc="groups that a token may use", ge=1)
    group_score_experts: int = setting(1, doc="a group's score is the sum of its best n selection scores; DeepSeek-V2 1, V3 2", ge=1)
    logit_bias: bool = setting(False, doc="learned bias inside the logits (GPT-OSS)")
    selection_bias: bool = setting(False, doc="bias [E] that moves the selection but not the weights (aux-loss-free balancing)")
    bias_update_rate: float = setting(0.0, doc="gamma of the update of that bias after each step; DeepSeek-V3 1e-3", ge=0)
    bias_update: Literal["sign", "proportional"] = setting(
        "sign", doc="b += gamma * sign(mean load - load) (DeepSeek-V3), or gamma * (mean load - load) / mean load (2408.15664)"
    )
    renormalise_null: bool = setting(
        True, doc="null experts count in that sum; false: they get weight 0 and the others sum to one (AdaMoE, MoE++'s code)"
    )
    zero_experts: ZeroExpertsConfig = setting(default_factory=ZeroExpertsConfig, doc="zero-computation experts beside the experts")
    jitter: float = setting(0.0, doc="training: the router's input is multiplied by U[1-jitter, 1+jitter] (Switch 0.01)", ge=0, lt=1)
    logit_soft_cap: float = setting(0.0, doc="cap * tanh(logits / cap); 0: off", ge=0)
    logit_noise: float = setting(0.0, doc="training: normal noise of deviation logit_noise / E on the logits (Tutel gate_noise 1)", ge=0)
    sampling: Literal["none", "later", "all"] = setting(
        "none",
        doc="training: choices are the best of logits plus Gumbel noise; later: all but the first (DeepSpeed's and GShard's "
        "second expert); all: the first too (DeepSpeed's RSample). Weights are without that noise",
    )

    def problems(self, path: str) -> Iterable[Problem]:
        yield from super().problems(path)
        if self.temperature_start is None and self.temperature_schedule != "exponential":
            yield Problem(f"{path}.temperature_schedule", self.temperature_schedule, f"needs {path}.temperature_start")
        if self.groups_per_token > self.num_groups:
            yield Problem(f"{path}.groups_per_token", self.groups_per_token, f"must be <= {path}.num_groups ({self.num_groups})")
        if self.bias_update_rate and not self.selection_bias:
            yield Problem(f"{path}.bias_update_rate", self.bias_update_rate, f"needs {path}.selection_bias=true, or it updates nothing")
        if self.selected_softmax and (self.score != "logit" or self.renormalise):
            yield Problem(f"{path}.selected_softmax", True, f"needs {path}.score=logit and {path}.renormalise=false: it already normalises")
        if self.sampling != "none" and (self.score not in ("softmax", "logit") or self.selection_bias or self.num_groups > 1):
            needs = f"needs {path}.score=softmax or logit, no selection_bias and {path}.num_groups=1"
            yield Problem(f"{path}.sampling", self.sampling, needs)
        if not self.renormalise_null and not (self.renormalise and self.zero_experts.num_null):
            needs = f"needs {path}.renormalise=true and {path}.zero_experts.num_null > 0"
            yield Problem(f"{path}.renormalise_null", False, needs)
        if self.sampling == "later" and self.top_k < 2:
            yield Problem(f"{path}.sampling", self.sampling, f"needs {path}.top_k >= 2: the first choice is not sampled")

    def check(self, path: str, *, num_experts: int) -> Iterable[Problem]:
        """Rules that involve the number of experts."""
        columns = num_experts + self.zero_experts.count
        if self.top_k_start is not None and self.top_k_start > columns:
            yield Problem(f"{path}.top_k_start", self.top_k_start, f"must be <= the {columns} experts")
        if columns % self.num_groups:
            yield Problem(f"{path}.num_groups", self.num_groups, f"must divide the {columns} experts")
            return
        size = columns // self.num_groups
        allowed = self.groups_per_token * size
        for name, top_k in (("top_k", self.top_k), ("top_k_start", self.top_k_start or 1)):
            if self.num_groups > 1 and allowed < top_k:
                yield Problem(f"{path}.{name}", top_k, f"must be <= the {allowed} experts in {self.groups_per_token} groups of {size}")
        if self.num_groups > 1 and self.group_score_experts > size:
            yield Problem(f"{path}.group_score_experts", self.group_score_experts, f"must be <= the {size} experts of a group")

    @property
    def provides(self) -> frozenset[str]:
        """Names that a routing has in ``aux`` in training."""
        return frozenset({"clean_logits", "noise_std"} if self.logit_noise else ())

    def make(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> TopKRouter:
        return TopKRouter(self, hidden_size, num_experts, dtype=dtype)


class TopKRouter(LinearRouter):
    """See the module's docstring. Selection bias is a buffer [E'], float32, never touched by the optimizer.

    top_k: experts per token at present; a schedule moves it, and evaluation may set it. temperature: buffer [], the present
    one if a schedule moves it.
    """

    selection_bias: Tensor | None
    temperature: Tensor | None
    top_k: int

    def __init__(self, config: TopKRouterConfig, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> None:
        columns = num_experts + config.zero_experts.count
        super().__init__(hidden_size, num_experts, num_columns=columns, bias=config.logit_bias, dtype=dtype)
        self.config = config
        self.top_k = config.top_k
        dtype = torch.promote_types(dtype, torch.float32)
        self.register_buffer("selection_bias", torch.zeros(columns, dtype=dtype) if config.selection_bias else None)
        annealed = config.temperature_start is not None
        self.register_buffer("temperature", torch.empty((), dtype=dtype) if annealed else None)
        if config.temperature_start is not None:
            self.initial = {**self.initial, "temperature": config.temperature_start}

    def forward(self, x: Tensor, ctx: RouterContext) -> Routing:
        """x: [T, D] -> fixed-k Routing."""
        return self.route(self.logits(self.jittered(x, ctx)), ctx)

    def jittered(self, x: Tensor, ctx: RouterContext) -> Tensor:
        """The input [T, D] of the scores."""
        if not (self.config.jitter and ctx.training):
            return x
        draws = ctx.uniform("jitter", x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        return x * (1 + self.config.jitter * (2 * draws - 1))

    def begin_step(self, step: int, total_steps: int) -> None:
        """Experts per token and temperature of this step."""
        super().begin_step(step, total_steps)
        config = self.config
        if config.top_k_start is not None:
            self.top_k = scheduled_top_k(config.top_k_start, config.top_k, step, total_steps, config.top_k_schedule)
        if self.temperature is not None and config.temperature_start is not None:
            course = config.temperature_schedule
            self.temperature.fill_(scheduled_value(config.temperature_start, config.temperature, step, total_steps, course))

    def route(self, logits: Tensor, ctx: RouterContext, noise_std: Tensor | None = None) -> Routing:
        """logits: [T, E'] in at least float32 -> Routing. noise_std: deviations of their noise in training [T, E'];
        default: logit_noise / E' for all."""
        config = self.config
        if config.logit_soft_cap:
            logits = config.logit_soft_cap * torch.tanh(logits / config.logit_soft_cap)
        aux = {}
        if noise_std is None and config.logit_noise:
            noise_std = torch.full((), config.logit_noise / self.num_columns, dtype=logits.dtype, device=logits.device)
        if noise_std is not None and ctx.training:
            aux = {"clean_logits": logits, "noise_std": noise_std}
            logits = logits + noise_std * noise.normal(self.draws("logit_noise", logits, ctx)).to(logits.dtype)
        scaled = logits
        if self.temperature is not None:
            scaled = logits / self.temperature.to(logits.dtype)
        elif config.temperature != 1.0:
            scaled = logits / config.temperature
        probs = distribution(scaled, config.score)
        scores = probs if config.score == "softmax" else score(scaled, config.score)
        index = ctx.once("select", lambda: self.choose(scaled.detach(), scores.detach(), ctx))
        weight = scores.gather(1, index)
        if config.selected_softmax:
            weight = torch.softmax(weight, dim=1)
        if not config.renormalise_null:
            weight = torch.where(index < self.num_columns - config.zero_experts.num_null, weight, 0.0)
        if config.renormalise:
            total = weight.sum(dim=1, keepdim=True)
            total = (total + config.renormalise_epsilon).clamp_min(config.renormalise_minimum)
            if not config.renormalise_null:
                total = torch.where(total == 0, 1.0, total)  # of null experts only
            weight = weight / total
        if config.scale != 1.0:
            weight = weight * config.scale
        return fixed_routing(
            index,
            weight,
            num_experts=self.num_experts,
            num_columns=self.num_columns,
            logits=logits,
            probs=probs,
            valid=ctx.valid,
            aux=aux,
        )

    def choose(self, logits: Tensor, scores: Tensor, ctx: RouterContext) -> Tensor:
        """Indices [T, K] of the chosen experts. logits, scores: [T, E'] without gradient."""
        if self.config.sampling != "none" and ctx.training:
            return self.sample(logits, ctx)
        return self.select(scores)

    def select(self, scores: Tensor) -> Tensor:
        """Indices [T, K] of the chosen experts, best first. scores: [T, E'] without gradient."""
        config = self.config
        if self.selection_bias is not None:
            scores = scores + self.selection_bias.to(scores.dtype)
        if config.num_groups > 1:
            scores = limit_groups(scores, config.num_groups, config.groups_per_token, config.group_score_experts)
        return scores.topk(self.top_k, dim=1).indices

    def sample(self, logits: Tensor, ctx: RouterContext) -> Tensor:
        """Indices [T, K] drawn without replacement with the softmax's probabilities; the best is first if ``later``."""
        noisy = logits + noise.gumbel(self.draws("sampling", logits, ctx))
        if self.config.sampling == "all":
            return noisy.topk(self.top_k, dim=1).indices
        first = logits.argmax(dim=1, keepdim=True)
        later = noisy.scatter(1, first, -torch.inf).topk(self.top_k - 1, dim=1).indices
        return torch.cat([first, later], dim=1)

    def draws(self, site: str, logits: Tensor, ctx: RouterContext) -> Tensor:
        """[T, E'] float64 uniform draws, one per logit: both tails of the noise need more digits than float32 has."""
        return ctx.uniform(site, logits.shape[1], dtype=torch.float64, device=logits.device)

    @torch.no_grad()
    def end_step(self, statistics: LayerStatistics) -> None:
        """Overloaded experts become less attractive, underloaded ones more, balanced ones stay."""
        if self.selection_bias is not None and self.config.bias_update_rate:
            load = statistics.selected.to(self.selection_bias.dtype)
            lack = load.mean() - load
            if self.config.bias_update == "sign":
                lack = torch.sign(lack)
            else:  # relative, so that gamma does not depend on the batch size
                lack /= load.mean().clamp_min(torch.finfo(load.dtype).tiny)
            self.selection_bias += (self.config.bias_update_rate * lack).to(self.selection_bias.device)


def score(logits: Tensor, kind: Score) -> Tensor:
    """Affinities [T, E] of logits [T, E]."""
    if kind == "softmax":
        return torch.softmax(logits, dim=1)
    if kind == "sigmoid":
        return torch.sigmoid(logits)
    if kind == "sqrt_softplus":
        return log_sqrt_softplus(logits).exp()
    return logits


def distribution(logits: Tensor, kind: Score) -> Tensor:
    """Affinities normalised over all experts, [T, E]; the softmax where the affinity is the logit itself.

    Computed from log-affinities: a sigmoid that underflows would otherwise let a router escape the balance loss.
    """
    if kind == "sigmoid":
        return torch.softmax(F.logsigmoid(logits), dim=1)
    if kind == "sqrt_softplus":
        return torch.softmax(log_sqrt_softplus(logits), dim=1)
    return torch.softmax(logits, dim=1)


def log_sqrt_softplus(logits: Tensor) -> Tensor:
    """log(sqrt(softplus(z))), finite with its gradient for any z: far below zero softplus(z) is exp(z)."""
    return 0.5 * torch.where(logits < LINEAR_BELOW, logits, F.softplus(logits.clamp_min(LINEAR_BELOW)).log())


def limit_groups(scores: Tensor, num_groups: int, keep: int, best: int) -> Tensor:
    """Selection scores [T, E] with all but the ``keep`` best groups of each token at -inf.

    Groups are equal runs of neighbouring experts; a group's score is the sum of its ``best`` largest scores.
    """
    grouped = scores.unflatten(1, (num_groups, -1))
    left, group_score = grouped, torch.zeros_like(grouped[:, :, 0])
    for _ in range(best):  # one maximum after the other: faster than topk, which costs much per group
        largest = left.max(dim=2, keepdim=True)
        group_score += largest.values[:, :, 0]
        left = left.scatter(2, largest.indices, -torch.inf)
    chosen = group_score.topk(keep, dim=1).indices
    excluded = torch.full_like(group_score, -torch.inf).scatter_(1, chosen, 0.0)
    return (grouped + excluded[:, :, None]).flatten(1)
