"""Matrix product into memory of another dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, *, out: Tensor, add: bool = False) -> None:
    """out = a @ b, or added to it. a: [m, k], b: [k, n] of one dtype; out: [m, n], also of another, which then takes the rounded
    product."""
    if out.dtype != a.dtype:
        out.add_(a @ b) if add else out.copy_(a @ b)
    elif add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)
