"""Routers: tokens -> Routing."""

from moetrain.moe.routers import (
    assignment,
    comet,
    cosine,
    dense_to_sparse,
    dselect,
    expert_choice,
    hashing,
    moduleformer,
    noisy,
    quantile,
    recurrent,
    residual,
    sparsemixer,
    stochastic,
    top_p,
    topk,
)
from moetrain.moe.routers.base import LinearRouter, Router

__all__ = [
    "LinearRouter",
    "Router",
    "assignment",
    "comet",
    "cosine",
    "dense_to_sparse",
    "dselect",
    "expert_choice",
    "hashing",
    "moduleformer",
    "noisy",
    "quantile",
    "recurrent",
    "residual",
    "sparsemixer",
    "stochastic",
    "top_p",
    "topk",
]
