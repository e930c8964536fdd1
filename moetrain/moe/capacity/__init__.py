"""Capacity policies: Routing -> Routing."""

from moetrain.moe.capacity import by_kind, policies
from moetrain.moe.capacity.policies import Capacity

__all__ = ["Capacity", "by_kind", "policies"]
