"""Routers: tokens -> Routing."""

from moetrain.moe.routers import assignment, cosine, expert_choice, hashing, moduleformer, noisy, sparsemixer, topk
from moetrain.moe.routers.base import LinearRouter, Router

__all__ = ["LinearRouter", "Router", "assignment", "cosine", "expert_choice", "hashing", "moduleformer", "noisy", "sparsemixer", "topk"]
