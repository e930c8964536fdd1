"""Routers: tokens -> Routing."""

from moetrain.moe.routers import comet, cosine, dense_to_sparse, dselect, stochastic, topk
from moetrain.moe.routers.base import LinearRouter, Router

__all__ = ["LinearRouter", "Router", "comet", "cosine", "dense_to_sparse", "dselect", "stochastic", "topk"]
