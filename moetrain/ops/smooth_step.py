"""The smooth-step activation: a sigmoid that reaches 0 and 1 (Hazimeh et al., 2002.07772 and 2106.03760)."""

from __future__ import annotations

import torch
from torch import Tensor


def smooth_step(t: Tensor, width: float) -> Tensor:
    """Exactly 0 below -width/2, exactly 1 above width/2, the cubic with continuous derivative in between."""
    u = t / width
    step = (-2 * u.square() + 1.5) * u + 0.5
    return torch.where(u <= -0.5, 0.0, torch.where(u >= 0.5, 1.0, step))
