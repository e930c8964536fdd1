"""Model FLOPs by active parameters: what the mathematics needs, recomputation and dropped work not counted."""

from __future__ import annotations

import torch
from torch import nn

from moetrain.models.common.attention import SoftmaxAttention
from moetrain.models.common.decoder import Decoder
from moetrain.models.common.layers import Linear
from moetrain.moe.routers.base import LinearRouter

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bfloat16 FLOP/s by GPU name, from the vendors' data sheets. An unknown device gets no utilisation figure."""


class FlopCounter:
    """FLOPs of forward and backward for a number of tokens and of rows computed by experts.

    Built from the model before it is sharded; later calls need only integers.
    """

    def __init__(self, model: Decoder) -> None:
        self.dense_per_token = 0
        self.attention_width = 0
        for module in model.modules():
            if isinstance(module, Linear):
                self.dense_per_token += 2 * module.weight.numel()
            elif isinstance(module, LinearRouter):
                weights = (*module.parameters(), *module.buffers())  # a router that is not trained has its matrix as a buffer
                self.dense_per_token += 2 * sum(w.numel() for w in weights if w.dim() == 2)
            elif isinstance(module, SoftmaxAttention):
                self.attention_width += module.num_heads * module.head_dim
        if model.head is None:
            self.dense_per_token += 2 * model.embed.numel()
        self.per_row = {name: layer.experts.flops_per_row() for name, layer in model.moe_layers().items()}

    def step(self, tokens: int, seq_len: int, rows: dict[str, int]) -> float:
        """FLOPs of one optimizer step. rows: by MoE layer, rows that experts computed. Backward counts twice the forward;
        causal attention half of the square."""
        attention = 2 * 2 * self.attention_width * (seq_len + 1) / 2
        forward = tokens * (self.dense_per_token + attention) + sum(self.per_row[name] * count for name, count in rows.items())
        return 3.0 * forward


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a device, or None if not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model that has not been sharded."""
    return sum(p.numel() for p in model.parameters())
