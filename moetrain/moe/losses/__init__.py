"""Auxiliary losses: Routing -> scalar."""

from moetrain.moe.losses import balance, load_importance, selectors, z
from moetrain.moe.losses.base import Loss

__all__ = ["Loss", "balance", "load_importance", "selectors", "z"]
