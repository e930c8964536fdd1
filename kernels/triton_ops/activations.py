"""Activations and their derivatives on tiles in float32; the names of ``moetrain.ops.activations``."""

from __future__ import annotations

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
RSQRT_2_PI = tl.constexpr(0.3989422804014327)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(-x)); exp overflows to infinity and the quotient to zero, as it should."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """act(x), float32."""
    if ACTIVATION == "silu":
        y = x * sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        y = x * sigmoid(x * TWICE_SQRT_2_OVER_PI * (1.0 + x * x * CUBIC))  # (1 + tanh u) / 2 = sigmoid(2 u)
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def activation_slope(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """act'(x), float32; 0 at relu's kink, as torch has it."""
    if ACTIVATION == "silu":
        s = sigmoid(x)
        slope = s + x * s * (1.0 - s)
    elif ACTIVATION == "gelu":
        slope = 0.5 * (1.0 + tl.erf(x * SQRT_HALF)) + x * RSQRT_2_PI * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        s = sigmoid(x * TWICE_SQRT_2_OVER_PI * (1.0 + x * x * CUBIC))
        slope = s + x * TWICE_SQRT_2_OVER_PI * s * (1.0 - s) * (1.0 + x * x * (3.0 * CUBIC))
    else:
        tl.static_assert(ACTIVATION == "relu")
        slope = tl.where(x > 0.0, 1.0, 0.0)
    return slope
