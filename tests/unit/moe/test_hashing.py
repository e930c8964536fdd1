"""Experts by token id: random, from a table, balanced; even and learned weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.moe.context import ForwardContext, RouterContext
from moetrain.moe.routers.hashing import HashConfig, TokenTableConfig, balanced_table
from moetrain.testing import assert_close
from moetrain.train.settings import Config

D, E, K, V, T = 6, 8, 2, 50, 400


def context(token_id: torch.Tensor, layer: str = "layers.0", **kwargs: Any) -> RouterContext:
    return ForwardContext(batch_size=1, seq_len=len(token_id), token_id=token_id, **kwargs).at(layer)


def tokens() -> torch.Tensor:
    return torch.randint(V, (T,), generator=torch.Generator().manual_seed(0))


def table_file(folder: Path, table: np.ndarray) -> str:
    np.save(folder / "table.npy", table)
    return str(folder / "table.npy")


def test_random_experts_depend_on_token_layer_and_seed_alone() -> None:
    x, ids = torch.randn(T, D, dtype=torch.float64), tokens()
    router = HashConfig(top_k=K).build(D, E, dtype=torch.float64)
    routing = router(x, context(ids))
    assert torch.equal(routing.expert_TK, router(-x, context(ids, step=7, seed=3, pass_id=1)).expert_TK)
    for token in ids.unique():
        assert len(routing.expert_TK[ids == token].unique(dim=0)) == 1
    assert bool((routing.expert_TK[:, 0] != routing.expert_TK[:, 1]).all())
    assert not torch.equal(routing.expert, router(x, context(ids, "layers.1")).expert)
    assert not torch.equal(routing.expert, HashConfig(top_k=K, hash_seed=1).build(D, E, dtype=torch.float64)(x, context(ids)).expert)
    assert bool((routing.weight == 1 / K).all()) and not list(router.parameters()) and routing.probs is None


def test_random_experts_are_even_over_many_ids() -> None:
    counts = HashConfig().build(D, E, dtype=torch.float32)(torch.zeros(8000, D), context(torch.arange(8000))).selected
    assert (counts - 1000).abs().max() < 150  # five deviations


def test_a_table_decides_and_the_learned_scores_weigh(tmp_path: Path) -> None:
    table = np.random.default_rng(0).permuted(np.tile(np.arange(E), (V, 1)), axis=1)[:, :K]
    path, ids = table_file(tmp_path, table), tokens()
    x = torch.randn(T, D, dtype=torch.float64)
    learned = TokenTableConfig(top_k=K, table=path).build(D, E, dtype=torch.float64)
    torch.nn.init.normal_(learned.weight)
    for router in (HashConfig(top_k=K, table=path).build(D, E, dtype=torch.float64), learned):
        router.initial["table"](router.table, torch.Generator())  # type: ignore[operator]
        assert torch.equal(router(x, context(ids)).expert_TK, torch.from_numpy(table)[ids])
    routing = learned(x, context(ids))
    scores = routing.probs.gather(1, routing.expert_TK)
    assert_close(routing.weight_TK, scores / scores.sum(1, keepdim=True), "layout")
    (routing.weight_TK[:, 0].sum()).backward()
    assert bool((learned.weight.grad != 0).any())


def test_a_balanced_table_evens_out_a_skewed_text() -> None:
    counts = (1000 / np.arange(1, 201)).astype(int)
    counts[150:] = 0
    table = balanced_table(counts, E)
    loads = np.bincount(table, weights=counts, minlength=E)
    assert loads.max() <= max(counts.max(), loads.mean() + counts[counts > 0].min() + 1)
    assert loads.min() > 0.7 * loads.mean() and table.min() >= 0 and table.max() < E
    unseen = np.bincount(balanced_table(np.zeros(8000, dtype=int), E), minlength=E)
    assert abs(unseen - 1000).max() < 150


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.zeros((V, 3), dtype=np.int64), "experts per token id, has 3"),
        (np.full((V, K), E), "must hold experts 0..7"),
        (np.zeros((V, K)), "not integers"),
        (None, "No such file"),
    ],
)
def test_tables_that_do_not_fit_are_named(tmp_path: Path, table: np.ndarray | None, message: str) -> None:
    path = str(tmp_path / "absent.npy") if table is None else table_file(tmp_path, table)
    for config in (HashConfig(top_k=K, table=path), TokenTableConfig(top_k=K, table=path)):
        problems = list(config.check("router", num_experts=E))
        assert [p.field for p in problems] == ["router.table"] and message in problems[0].expected
    if table is None:
        with pytest.raises(ConfigError, match="router.table"):
            HashConfig(top_k=K, table=path).build(D, E, dtype=torch.float32)


def test_losses_have_nothing_to_act_on() -> None:
    class Sections:
        router, experts = HashConfig(), type("Experts", (), {"num_experts": E})
        loss = {"z": type("Loss", (), {"kind": "z_loss"})}
        capacity = model = None
        metrics = type("Metrics", (), {"profile_step": None})
        spawn_problems = staticmethod(tuple)

    assert [p.field for p in Config.problems(Sections, "")] == ["loss.z"]  # type: ignore[arg-type]
