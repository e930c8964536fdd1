"""Routers: tokens -> Routing."""

from moetrain.moe.routers import cosine, moduleformer, noisy, topk
from moetrain.moe.routers.base import LinearRouter, Router

__all__ = ["LinearRouter", "Router", "cosine", "moduleformer", "noisy", "topk"]
