"""Routers: tokens -> Routing."""

from moetrain.moe.routers import cosine, recurrent, residual, top_p, topk
from moetrain.moe.routers.base import LinearRouter, Router

__all__ = ["LinearRouter", "Router", "cosine", "recurrent", "residual", "top_p", "topk"]
