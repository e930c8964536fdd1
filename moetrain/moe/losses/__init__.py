"""Auxiliary losses: Routing -> scalar."""

from moetrain.moe.losses import balance, entropy, heterogeneous, information, load_importance, selectors, variation, z
from moetrain.moe.losses.base import Loss

__all__ = ["Loss", "balance", "entropy", "heterogeneous", "information", "load_importance", "selectors", "variation", "z"]
