"""Experts by token id: random, from a table, with even or learned weights (Hash layers, 2106.04426)."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from moetrain.config import Component, setting
from moetrain.errors import ConfigError, Problem
from moetrain.moe.context import RouterContext
from moetrain.moe.routers.base import Router
from moetrain.moe.routers.topk import TopKRouter, TopKRouterConfig
from moetrain.moe.routing import Routing, fixed_routing
from moetrain.ops import noise
from moetrain.registry import register

_TABLE_DOC = "NumPy file with the experts of each token id, int64 [V] or [V, K] (scripts/hash_table.py makes a balanced one); null: random"
_SEED_DOC = "of the random experts; each layer has its own"


@register("router", "hash", source="Hash layers 2106.04426")
@dataclass(kw_only=True)
class HashConfig(Component):
    """Experts by token id, even weights; nothing is learned, and there is nothing for a loss to act on."""

    scored: ClassVar[bool] = False
    top_k: int = setting(1, doc="experts per token; the paper 1", ge=1)
    table: str | None = setting(None, doc=_TABLE_DOC)
    hash_seed: int = setting(0, doc=_SEED_DOC, ge=0)

    def check(self, path: str, *, num_experts: int) -> Iterable[Problem]:
        yield from check_table(path, self.table, self.top_k, num_experts)

    def build(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> HashRouter:
        return HashRouter(self, num_experts)


class HashRouter(Router):
    """table: [V, K] int64 buffer, or None for random experts."""

    table: Tensor | None

    def __init__(self, config: HashConfig, num_experts: int) -> None:
        super().__init__()
        self.config, self.num_experts, self.top_k = config, num_experts, config.top_k
        register_table(self, config.table)

    def forward(self, x: Tensor, ctx: RouterContext) -> Routing:
        """x: [T, D] -> fixed-k Routing."""
        expert = ctx.once("select", lambda: experts_of(ctx, self.table, self.num_experts, self.top_k, self.config.hash_seed))
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = torch.full(expert.shape, 1 / self.top_k, dtype=dtype, device=x.device)
        return fixed_routing(expert, weight, num_experts=self.num_experts, valid=ctx.valid)


@register("router", "token_table", source="Hash layers 2106.04426, DeepSeek-V4 in transformers")
@dataclass(kw_only=True)
class TokenTableConfig(TopKRouterConfig):
    """Experts by token id, weights from learned scores; otherwise the settings of topk."""

    renormalise: bool = setting(True, doc="divide the K weights of a token by their sum")
    table: str | None = setting(None, doc=_TABLE_DOC)
    hash_seed: int = setting(0, doc=_SEED_DOC, ge=0)

    def problems(self, path: str) -> Iterable[Problem]:
        yield from super().problems(path)
        if self.sampling != "none" or self.selection_bias or self.num_groups > 1 or self.top_k_start is not None:
            yield Problem(path, self.kind, "needs no sampling, selection bias, groups or top_k_start: the token id decides")

    def check(self, path: str, *, num_experts: int) -> Iterable[Problem]:
        yield from super().check(path, num_experts=num_experts)
        yield from check_table(path, self.table, self.top_k, num_experts)

    def make(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> TokenTableRouter:
        return TokenTableRouter(self, hidden_size, num_experts, dtype=dtype)


class TokenTableRouter(TopKRouter):
    """table: [V, K] int64 buffer, or None for random experts."""

    table: Tensor | None

    def __init__(self, config: TokenTableConfig, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> None:
        super().__init__(config, hidden_size, num_experts, dtype=dtype)
        self.hash_seed = config.hash_seed
        register_table(self, config.table)

    def choose(self, logits: Tensor, scores: Tensor, ctx: RouterContext) -> Tensor:
        return experts_of(ctx, self.table, self.num_experts, self.top_k, self.hash_seed)


def experts_of(ctx: RouterContext, table: Tensor | None, num_experts: int, top_k: int, seed: int) -> Tensor:
    """[T, K] different experts of each token: by the table, else a random choice that depends on its id, the layer and the seed."""
    assert ctx.token_id is not None, "this router needs the token ids in the forward context"
    if table is not None:
        return table[ctx.token_id]
    key = noise.mix(ctx.token_id + noise.hash_text(f"{seed}/{ctx.name}/hash"))
    return noise.uniform(key, num_experts, torch.float64).topk(top_k, dim=1).indices


def read_table(path: str) -> Tensor:
    """[V, K] int64. Raises OSError or ValueError if the file is none of integers with one or two dimensions."""
    table = np.load(Path(path).expanduser(), allow_pickle=False)
    if table.ndim not in (1, 2) or not np.issubdtype(table.dtype, np.integer):
        raise ValueError(f"holds {table.dtype} {list(table.shape)}, not integers [V] or [V, K]")
    return torch.from_numpy(table.astype(np.int64)).view(len(table), -1)


def check_table(path: str, table: str | None, top_k: int, num_experts: int) -> Iterable[Problem]:
    """What is wrong with a table of experts."""
    if table is None:
        return
    try:
        experts = read_table(table)
    except (OSError, ValueError) as error:
        yield Problem(f"{path}.table", table, str(error))
        return
    if experts.shape[1] != top_k:
        yield Problem(f"{path}.table", table, f"must have {path}.top_k ({top_k}) experts per token id, has {experts.shape[1]}")
    if int(experts.min()) < 0 or int(experts.max()) >= num_experts:
        yield Problem(f"{path}.table", table, f"must hold experts 0..{num_experts - 1}, holds {int(experts.min())}..{int(experts.max())}")


def register_table(router: Router, path: str | None) -> None:
    """Give a router its buffer ``table``, whose start is the file's content. Raises ConfigError if it cannot be read."""
    if path is None:
        router.register_buffer("table", None)
        return
    try:
        with torch.device("cpu"):  # models are built on the meta device
            table = read_table(path)
    except (OSError, ValueError) as error:
        raise ConfigError([Problem("router.table", path, str(error))]) from error
    router.register_buffer("table", torch.empty(table.shape, dtype=torch.int64))
    router.initial = {**router.initial, "table": lambda tensor, generator: tensor.copy_(table)}  # type: ignore[dict-item,return-value]


def balanced_table(counts: np.ndarray, num_experts: int, *, seed: int = 0) -> np.ndarray:
    """Expert [V] int64 of each token id, such that experts get nearly the same number of tokens: ids by falling number of
    occurrences, each to the expert with the fewest so far. counts: [V]. Ids that never occur are spread at random."""
    experts = np.random.default_rng(seed).integers(num_experts, size=len(counts))
    loads = [(0, expert) for expert in range(num_experts)]
    for token in np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]:
        load, expert = heapq.heappop(loads)
        experts[token] = expert
        heapq.heappush(loads, (load + int(counts[token]), expert))
    return experts
