"""Zero-computation experts (MoE++, 2410.07348 eq. 3-5): constant, copy and null.

They take the expert ids from num_experts on, in this order. Every rank evaluates them for its own tokens: their entries
are never dispatched, and what parameters they have are dense ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.config import setting
from moetrain.moe.routing import Routing


@dataclass(kw_only=True)
class ZeroExpertsConfig:
    """How many zero-computation experts of each kind a router scores beside the experts."""

    num_constant: int = setting(0, doc="a1 x + a2 v with learned v and [a1, a2] = softmax(W x) (MoE++)", ge=0)
    num_copy: int = setting(0, doc="x itself (Longcat-Flash, MoE++)", ge=0)
    num_null: int = setting(0, doc="nothing (AdaMoE; the zero expert of MoE++)", ge=0)

    @property
    def count(self) -> int:
        """Z, those of all kinds."""
        return self.num_constant + self.num_copy + self.num_null

    def build(self, hidden_size: int, *, dtype: torch.dtype) -> ZeroExperts | None:
        """The module that computes them; None if none of them contributes anything."""
        return ZeroExperts(self, hidden_size, dtype=dtype) if self.num_constant or self.num_copy else None


class ZeroExperts(nn.Module):
    """mix: [C, 2, D], W of each constant expert. vector: [C, D], v. None without constant experts."""

    def __init__(self, config: ZeroExpertsConfig, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.mix = self.vector = None
        if config.num_constant:
            self.mix = nn.Parameter(torch.empty(config.num_constant, 2, hidden_size, dtype=dtype))
            self.vector = nn.Parameter(torch.empty(config.num_constant, hidden_size, dtype=dtype))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """[T, D]: the sum over a token's entries for zero-computation experts of weight * expert(x). x: [T, D]."""
        weight = self.weights(routing)
        rows, constant, copy = x.to(weight.dtype), self.config.num_constant, self.config.num_copy
        of_x = weight[:, constant : constant + copy].sum(dim=1, keepdim=True)
        if self.mix is None or self.vector is None:
            return (of_x * rows).to(x.dtype)
        mix = torch.softmax(nn.functional.linear(rows, self.mix.flatten(0, 1).to(rows.dtype)).unflatten(1, (constant, 2)), dim=2)
        a1, a2 = (weight[:, :constant, None] * mix).unbind(dim=2)
        return ((of_x + a1.sum(dim=1, keepdim=True)) * rows + a2 @ self.vector.to(rows.dtype)).to(x.dtype)

    def weights(self, routing: Routing) -> Tensor:
        """[T, Z] combine weights, 0 where a token has not chosen an expert."""
        column = (routing.expert - routing.num_experts).clamp_min(-1) + 1  # column 0 takes the entries of all others
        weight = routing.weight.new_zeros(routing.num_tokens, self.config.count + 1)
        return weight.index_put((routing.token, column), routing.weight, accumulate=True)[:, 1:]


def count_zero_experts(router: Any) -> int:
    """Z of a router's configuration; 0 if that knows no zero-computation experts."""
    zero_experts = getattr(router, "zero_experts", None)
    return 0 if zero_experts is None else zero_experts.count
