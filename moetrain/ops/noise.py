"""Counter-based randomness: every number is a function of its coordinates, not of what was drawn before.

So noise does not depend on the layout, on the order of execution or on recomputation. The mixing function is
splitmix64's finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), on
int64 tensors with wrapping arithmetic: torch's generators keep only 32 bits of a seed on CPU and cannot be
indexed by token.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

SMALLEST = 2.0**-54
"""Stands for a draw of zero, whose quantile is infinite: half the step of float64 draws."""

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def hash_text(text: str, bits: int = 63) -> int:
    """A stable non-negative hash of a text, e.g. a seed joined with a parameter's name."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") & ((1 << bits) - 1)


def mix(x: Tensor) -> Tensor:
    """splitmix64's output function on int64, elementwise."""
    # in place: new memory for each of these operations would cost several times their arithmetic
    x = x + _GOLDEN
    scratch = torch.empty_like(x)
    _xor_shifted(x, 30, scratch).mul_(_MIX_1)
    _xor_shifted(x, 27, scratch).mul_(_MIX_2)
    return _xor_shifted(x, 31, scratch)


def _xor_shifted(x: Tensor, bits: int, scratch: Tensor) -> Tensor:
    """x ^= x >> bits with a logical shift; torch's is arithmetic on int64."""
    return x.bitwise_xor_(torch.bitwise_right_shift(x, bits, out=scratch).bitwise_and_((1 << (64 - bits)) - 1))


def uniform(key: Tensor, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``count`` numbers in [0, 1) for each key. key: [T] int64; returns [T, count] with 24 (float32) or 53 random bits."""
    counter = torch.arange(count, device=key.device, dtype=torch.int64)
    bits = mix(mix(key)[:, None] + counter)
    digits = 53 if dtype == torch.float64 else 24
    return bits.bitwise_right_shift_(64 - digits).bitwise_and_((1 << digits) - 1).to(dtype).mul_(2.0**-digits)


def normal(draws: Tensor) -> Tensor:
    """Standard normal numbers from uniform ones, by the quantile function; float64 draws reach further into the tails."""
    positive = draws.clamp_min(SMALLEST)
    return torch.special.ndtri(positive, out=positive)


def gumbel(draws: Tensor) -> Tensor:
    """Gumbel(0, 1) numbers from uniform ones. The K largest of log-probabilities plus such noise are K choices drawn
    without replacement (Kool, van Hoof, Welling, 1903.06059)."""
    return draws.clamp_min(SMALLEST).log_().neg_().log_().neg_()
