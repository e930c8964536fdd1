"""Auxiliary losses: Routing -> scalar."""

from moetrain.moe.losses import balance, z
from moetrain.moe.losses.base import Loss

__all__ = ["Loss", "balance", "z"]
