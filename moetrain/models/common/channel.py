"""The channel block that a family wants to be an MoE layer, also before its experts have been spawned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.models.common.layers import FeedForward
from moetrain.moe.layer import MoEParts


class OneExpert(nn.Module):
    """One FFN of an expert's size that stands for all experts of a layer, beside the shared expert if there is one.

    The weights of all choices summing to one, this is an MoE layer with equal experts (EvoMoE, 2112.14397, first phase).
    """

    def __init__(self, expert: FeedForward, shared: nn.Module | None) -> None:
        super().__init__()
        self.expert, self.shared = expert, shared

    def forward(self, x: Tensor) -> Tensor:
        y = self.expert(x)
        return y if self.shared is None else y + self.shared(x)


def build_channel(moe: MoEParts, hidden_size: int, *, dtype: torch.dtype, shared: nn.Module | None = None) -> nn.Module:
    """An MoE layer, or what stands in its place until experts are spawned."""
    if not moe.one_expert:
        return moe.build(hidden_size, dtype=dtype, shared=shared)
    experts = moe.experts
    expert = FeedForward(hidden_size, experts.width, activation=experts.activation, gated=experts.gated, dtype=dtype)
    return OneExpert(expert, shared)
