"""ModuleFormer's gate (2306.04640): raw softmax probabilities of linear, MLP or cosine logits, with explored choices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.config import setting
from moetrain.errors import Problem
from moetrain.moe.context import RouterContext
from moetrain.moe.routers.base import at_least_float32
from moetrain.moe.routers.topk import TopKRouter, TopKRouterConfig
from moetrain.ops import noise
from moetrain.registry import register

EXPLORE_EPSILON = 1e-6
"""Added to the probabilities from which explored experts are drawn."""


@register("router", "moduleformer", source="ModuleFormer 2306.04640")
@dataclass(kw_only=True)
class ModuleFormerRouterConfig(TopKRouterConfig):
    """Top-k of a two-layer gate, not renormalised; otherwise the settings of topk."""

    gate: Literal["mlp", "cosine"] = setting("mlp", doc="logits: W2 gelu(W1 x + b), or scaled cosines of W x with an expert's centroid")
    gate_size: int = setting(256, doc="width of the gate's hidden layer, or dimensions of the centroids", ge=1)
    explored: int = setting(0, doc="training: so many of the K experts are drawn by probability, not taken as the best", ge=0)

    def problems(self, path: str) -> Iterable[Problem]:
        yield from super().problems(path)
        if self.logit_bias:
            yield Problem(f"{path}.logit_bias", True, "must be false: this gate has its bias in the hidden layer")
        if self.explored > self.top_k:
            yield Problem(f"{path}.explored", self.explored, f"must be <= {path}.top_k ({self.top_k})")
        if self.explored and (self.score != "softmax" or self.sampling != "none" or self.top_k_start is not None):
            yield Problem(f"{path}.explored", self.explored, f"needs {path}.score=softmax, no sampling and no top_k_start")

    def make(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> ModuleFormerRouter:
        return ModuleFormerRouter(self, hidden_size, num_experts, dtype=dtype)


class ModuleFormerRouter(TopKRouter):
    """weight: [E', P], the second matrix or the centroids. hidden_weight: [P, D]; hidden_bias: [P] or, with cosines,
    log_scale: [1]."""

    initial = {"hidden_bias": 0.0, "log_scale": 0.0}

    def __init__(self, config: ModuleFormerRouterConfig, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> None:
        super().__init__(config, config.gate_size, num_experts, dtype=dtype)
        self.explored = config.explored
        self.hidden_weight = nn.Parameter(torch.empty(config.gate_size, hidden_size, dtype=dtype))
        mlp = config.gate == "mlp"
        self.hidden_bias = nn.Parameter(torch.empty(config.gate_size, dtype=dtype)) if mlp else None
        self.log_scale = None if mlp else nn.Parameter(torch.empty(1, dtype=dtype))

    def logits(self, x: Tensor) -> Tensor:
        """[T, E'] in at least float32."""
        x = at_least_float32(x)
        weight = self.weight.to(x.dtype)
        bias = None if self.hidden_bias is None else self.hidden_bias.to(x.dtype)
        hidden = F.linear(x, self.hidden_weight.to(x.dtype), bias)
        if self.log_scale is None:
            return F.linear(F.gelu(hidden), weight)
        return self.log_scale.to(x.dtype).exp() * F.linear(F.normalize(hidden, dim=1), F.normalize(weight, dim=1))

    def choose(self, logits: Tensor, scores: Tensor, ctx: RouterContext) -> Tensor:
        """Indices [T, K]: the best, then the explored ones, drawn without replacement from the others."""
        if not (self.explored and ctx.training):
            return super().choose(logits, scores, ctx)
        best = scores.topk(self.top_k - self.explored, dim=1).indices
        noisy = (scores + EXPLORE_EPSILON).log() + noise.gumbel(self.draws("explore", logits, ctx))
        drawn = noisy.scatter(1, best, -torch.inf).topk(self.explored, dim=1).indices
        return torch.cat([best, drawn], dim=1)
