"""Dense-to-sparse gates: a softmax whose temperature falls, so that tokens start with all experts and end with few.

Sources: EvoMoE (2112.14397); with an activation inside the scores, Nguyen, Akbarian and Ho (2401.13875).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.config import setting
from moetrain.errors import Problem
from moetrain.moe.context import RouterContext
from moetrain.moe.routers.base import LearnedRouterConfig, LinearRouter, at_least_float32
from moetrain.moe.routing import Routing, ragged_routing
from moetrain.ops import noise
from moetrain.registry import register

SCORE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda z: z,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
}
MIN_TEMPERATURE = 1e-3
"""Bound of a learned temperature: zero would make infinite scores."""


@register("router", "dense_to_sparse", source="EvoMoE 2112.14397; activation: 2401.13875")
@dataclass(kw_only=True)
class DenseToSparseRouterConfig(LearnedRouterConfig):
    """Every expert whose probability at the present temperature is above a threshold.

    s = softmax((activation(x W^T) + b + Gumbel noise) / temperature). Weights are not renormalised.
    """

    activation: Literal["linear", "sigmoid", "tanh", "gelu", "silu"] = setting("linear", doc="of the scores, before the bias")
    logit_bias: bool = setting(False, doc="learned bias, added behind the activation")
    temperature: float = setting(2.0, doc="temperature at step 0; EvoMoE's code 1.0", gt=0)
    final_temperature: float = setting(0.3, doc="temperature from decay_steps on; EvoMoE's code 0.5", gt=0, schedule="EvoMoE 2112.14397")
    decay: Literal["exponential", "linear", "constant", "learned"] = setting(
        "exponential", doc="course of the temperature in between; constant and learned: start at temperature and ignore the final one"
    )
    decay_steps: int | None = setting(None, doc="optimizer steps until the final temperature; default: all of them", ge=1)
    threshold: float = setting(0.001, doc="an expert is selected if its probability is above this; must be < 1/E", ge=0, lt=1)
    hard_after: int | None = setting(
        None,
        doc="training: from this step on only the best expert of a token; released code 0",
        ge=0,
        schedule="EvoMoE 2112.14397",
    )
    noise: bool = setting(True, doc="training: Gumbel noise on the scores")
    weights: Literal["noisy", "clean"] = setting(
        "noisy", doc="training: weigh by s, or by the softmax without noise and at temperature 1 (the noise then only selects)"
    )
    evaluation: Literal["best", "threshold", "all"] = setting(
        "best",
        doc="best: top-1 of the softmax at temperature 1, weighed by its probability; threshold: as in training, without noise; "
        "all: every expert, weighed by the softmax at temperature 1",
    )

    def check(self, path: str, *, num_experts: int) -> Iterable[Problem]:
        """Rules that involve the number of experts."""
        if self.threshold * num_experts >= 1:
            limit = f"must be < 1 / experts.num_experts ({1 / num_experts:.3g}), or a token with even scores has no expert"
            yield Problem(f"{path}.threshold", self.threshold, limit)

    def make(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> DenseToSparseRouter:
        return DenseToSparseRouter(self, hidden_size, num_experts, dtype=dtype)


class DenseToSparseRouter(LinearRouter):
    """See :class:`DenseToSparseRouterConfig`. decayed: buffer [], the share of the decay that is behind us.

    log_temperature: parameter [1] if the temperature is learned.
    """

    decayed: Tensor

    def __init__(self, config: DenseToSparseRouterConfig, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, num_experts, bias=config.logit_bias, dtype=dtype)
        self.config = config
        self.hard = False
        self.log_temperature = nn.Parameter(torch.empty(1, dtype=dtype)) if config.decay == "learned" else None
        self.initial = {"log_temperature": math.log(config.temperature)}
        self.register_buffer("decayed", torch.zeros((), dtype=torch.promote_types(dtype, torch.float32)))

    def begin_step(self, step: int, total_steps: int) -> None:
        super().begin_step(step, total_steps)
        config = self.config
        self.decayed.fill_(min(1.0, step / (config.decay_steps or total_steps)))
        self.hard = config.hard_after is not None and step >= config.hard_after

    def temperature(self) -> Tensor:
        """The present temperature, [] or [1]."""
        config = self.config
        if self.log_temperature is not None:
            return at_least_float32(self.log_temperature).clamp_min(math.log(MIN_TEMPERATURE)).exp()
        start, end = config.temperature, config.final_temperature if config.decay != "constant" else config.temperature
        if config.decay == "linear":
            return start + (end - start) * self.decayed
        return start * torch.pow(end / start, self.decayed)

    def logits(self, x: Tensor) -> Tensor:
        """[T, E] scores in at least float32, before noise and temperature."""
        x = at_least_float32(x)
        scores = SCORE_ACTIVATIONS[self.config.activation](F.linear(x, self.weight.to(x.dtype)))
        return scores if self.bias is None else scores + self.bias.to(x.dtype)

    def forward(self, x: Tensor, ctx: RouterContext) -> Routing:
        """x: [T, D] -> ragged Routing."""
        return self.route(self.logits(x), ctx)

    def route(self, logits: Tensor, ctx: RouterContext) -> Routing:
        """logits: [T, E] in at least float32 -> Routing, whose probs are s (in evaluation without noise)."""
        config, training = self.config, ctx.training
        noisy = logits
        if training and config.noise:
            draws = ctx.uniform("gumbel", logits.shape[1], dtype=torch.float64, device=logits.device)
            noisy = logits + noise.gumbel(draws).to(logits.dtype)
        probs = torch.softmax(noisy / self.temperature().to(logits.dtype), dim=1)
        clean = (config.weights == "clean") if training else (config.evaluation != "threshold")
        weight = torch.softmax(logits, dim=1) if clean else probs
        selected = ctx.once("select", lambda: self.select(weight if clean and not training else probs, training))
        return ragged_routing(selected, weight, num_experts=self.num_experts, logits=logits, probs=probs, valid=ctx.valid)

    def select(self, probs: Tensor, training: bool) -> Tensor:
        """[T, E] bool. probs: [T, E]."""
        if not training and self.config.evaluation == "all":
            return torch.ones_like(probs, dtype=torch.bool)
        if self.hard if training else self.config.evaluation == "best":
            best = probs.argmax(dim=1, keepdim=True)
            return torch.zeros_like(probs, dtype=torch.bool).scatter_(1, best, True)
        return probs > self.config.threshold
