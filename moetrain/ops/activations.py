"""Activations by name with their derivatives, and the gated linear unit (Shazeer, 2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


Into = Callable[..., Tensor]


@dataclass(frozen=True)
class ActivationFunction:
    """forward: act(z), for autograd. forward_into: (z, out), backward_into: (gradient of act(z), z, out): the gradient of z;
    both without autograd, into given memory, which they return."""

    forward: Callable[[Tensor], Tensor]
    forward_into: Into
    backward_into: Into


def _gelu(approximate: str) -> ActivationFunction:
    return ActivationFunction(
        partial(F.gelu, approximate=approximate),
        lambda z, out: _aten.gelu.out(z, approximate=approximate, out=out),
        lambda grad, z, out: _aten.gelu_backward.grad_input(grad, z, approximate=approximate, grad_input=out),
    )


_aten = torch.ops.aten
ACTIVATIONS: dict[str, ActivationFunction] = {
    "silu": ActivationFunction(
        F.silu, lambda z, out: _aten.silu.out(z, out=out), lambda grad, z, out: _aten.silu_backward.grad_input(grad, z, grad_input=out)
    ),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "relu": ActivationFunction(
        F.relu,
        lambda z, out: torch.clamp_min(z, 0, out=out),
        lambda grad, z, out: _aten.threshold_backward.grad_input(grad, z, 0, grad_input=out),
    ),
}


def hidden_activation(h: Tensor, activation: Activation, *, gated: bool) -> Tensor:
    """act(h) or, gated, act(first half) * second half. h: [..., F or 2F] -> [..., F]."""
    act = ACTIVATIONS[activation].forward
    if not gated:
        return act(h)
    gate, up = h.chunk(2, dim=-1)
    return act(gate) * up
