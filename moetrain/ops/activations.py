"""Activations by name, and the gated linear unit (Shazeer, 2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def hidden_activation(h: Tensor, activation: Activation, *, gated: bool) -> Tensor:
    """act(h) or, gated, act(first half) * second half. h: [..., F or 2F] -> [..., F]."""
    act = ACTIVATIONS[activation]
    if not gated:
        return act(h)
    gate, up = h.chunk(2, dim=-1)
    return act(gate) * up
