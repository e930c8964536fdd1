"""Activations by name with their derivatives, and the gated linear unit (Shazeer, 2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class ActivationFunction:
    """forward: act(z). backward: (gradient of act(z), z) -> gradient of z."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


_aten = torch.ops.aten
ACTIVATIONS: dict[str, ActivationFunction] = {
    "silu": ActivationFunction(F.silu, _aten.silu_backward),
    "gelu": ActivationFunction(F.gelu, _aten.gelu_backward),
    "gelu_tanh": ActivationFunction(
        lambda z: F.gelu(z, approximate="tanh"), lambda grad, z: _aten.gelu_backward(grad, z, approximate="tanh")
    ),
    "relu": ActivationFunction(F.relu, lambda grad, z: _aten.threshold_backward(grad, z, 0)),
}


def hidden_activation(h: Tensor, activation: Activation, *, gated: bool) -> Tensor:
    """act(h) or, gated, act(first half) * second half. h: [..., F or 2F] -> [..., F]."""
    act = ACTIVATIONS[activation].forward
    if not gated:
        return act(h)
    gate, up = h.chunk(2, dim=-1)
    return act(gate) * up
