"""Auxiliary losses: Routing -> scalar."""

from moetrain.moe.losses import balance, entropy, heterogeneous, load_importance, z
from moetrain.moe.losses.base import Loss

__all__ = ["Loss", "balance", "entropy", "heterogeneous", "load_importance", "z"]
