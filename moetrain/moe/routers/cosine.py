"""The cosine top-k router: logits are scaled cosines between projected tokens and expert embeddings.

Sources: X-MoE (2204.09179), Tutel's gate (2206.03382). After the logits it is the top-k router.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moetrain.config import setting
from moetrain.errors import Problem
from moetrain.moe.routers.base import at_least_float32
from moetrain.moe.routers.topk import TopKRouter, TopKRouterConfig
from moetrain.registry import register

MAX_SCALE = 100.0
"""Bound of the learned scale (temperature 0.01), so that the softmax does not harden without limit."""


@register("router", "cosine_topk", source="X-MoE 2204.09179, Tutel 2206.03382")
@dataclass(kw_only=True)
class CosineTopKRouterConfig(TopKRouterConfig):
    """Top-k of learned-temperature cosines in a low-dimensional space; otherwise the settings of topk."""

    projection_size: int = setting(256, doc="dimensions in which tokens and experts are compared", ge=1)
    temperature: float = setting(0.5, doc="divides the cosines, at first: it is learned, down to 0.01", ge=1 / MAX_SCALE)

    def problems(self, path: str) -> Iterable[Problem]:
        yield from super().problems(path)
        if self.logit_bias:
            yield Problem(f"{path}.logit_bias", True, "must be false: cosines have no bias")

    def make(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> CosineTopKRouter:
        return CosineTopKRouter(self, hidden_size, num_experts, dtype=dtype)


class CosineTopKRouter(TopKRouter):
    """weight: [E', P] expert embeddings. projection: [P, D] with projection_bias [P]. log_scale: [1]."""

    def __init__(self, config: CosineTopKRouterConfig, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> None:
        super().__init__(config, config.projection_size, num_experts, dtype=dtype)
        self.initial = {**self.initial, "projection_bias": 0.0, "log_scale": -math.log(config.temperature)}
        self.projection = nn.Parameter(torch.empty(config.projection_size, hidden_size, dtype=dtype))
        self.projection_bias = nn.Parameter(torch.empty(config.projection_size, dtype=dtype))
        self.log_scale = nn.Parameter(torch.empty(1, dtype=dtype))

    def logits(self, x: Tensor) -> Tensor:
        """[T, E'] in at least float32: exp(min(log_scale, log 100)) * cos(W x + b, v_e)."""
        x = at_least_float32(x)
        projection, bias, embedding, log_scale = (
            p.to(x.dtype) for p in (self.projection, self.projection_bias, self.weight, self.log_scale)
        )
        token = nn.functional.normalize(nn.functional.linear(x, projection, bias), dim=1)
        scale = log_scale.clamp_max(math.log(MAX_SCALE)).exp()
        return scale * nn.functional.linear(token, nn.functional.normalize(embedding, dim=1))
