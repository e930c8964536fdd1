"""Capacity policies: Routing -> Routing."""

from moetrain.moe.capacity import policies
from moetrain.moe.capacity.policies import Capacity

__all__ = ["Capacity", "policies"]
