"""Random experts: even, reproducible, at the granularity that was asked for; contexts of repeated batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moetrain.moe.context import ForwardContext
from moetrain.moe.routers.stochastic import StochasticRouterConfig
from moetrain.testing import assert_close

B, S, E = 16, 8, 5


def route(*, passes: int = 1, training: bool = True, step: int = 0, seed: int = 0, batch: int = B, **settings: Any):
    ctx = ForwardContext(batch_size=batch, seq_len=S, training=training, step=step, seed=seed).repeated(passes).at("layers.0")
    router = StochasticRouterConfig(**settings).build(3, E, dtype=torch.float64)
    return router(torch.zeros(passes * batch * S, 3, dtype=torch.float64), ctx)


@pytest.mark.parametrize(("granularity", "groups"), [("token", B * S), ("sequence", B), ("pass", 1)])
def test_what_draws_an_expert_of_its_own(granularity: str, groups: int) -> None:
    routing = route(granularity=granularity)
    assert bool((routing.weight == 1).all()) and routing.top_k == 1
    expert = routing.expert.view(groups, -1)
    assert bool((expert == expert[:, :1]).all())
    assert len(expert.unique()) == min(groups, E)
    assert torch.equal(expert, route(granularity=granularity).expert.view(groups, -1))
    assert not all(torch.equal(route(granularity=granularity, step=step).expert, routing.expert) for step in range(1, 5))


@pytest.mark.parametrize("granularity", ["token", "sequence", "pass"])
def test_draws_are_even(granularity: str) -> None:
    """Chi-square with E - 1 = 4 degrees of freedom: above 18.5 once in a thousand."""
    steps = {"token": 10, "sequence": 60, "pass": 600}[granularity]
    groups = {"token": B * S, "sequence": B, "pass": 1}[granularity]
    drawn = torch.cat([route(granularity=granularity, step=step).expert.view(groups, -1)[:, 0] for step in range(steps)])
    counts, mean = torch.bincount(drawn, minlength=E).double(), steps * groups / E
    assert float(((counts - mean) ** 2 / mean).sum()) < 18.5


@pytest.mark.parametrize("granularity", ["token", "sequence", "pass"])
def test_passes_draw_independently_and_the_first_as_if_alone(granularity: str) -> None:
    pairs = []
    for step in range(40):
        first, second = route(granularity=granularity, passes=2, step=step, batch=4).expert.chunk(2)
        assert torch.equal(first, route(granularity=granularity, step=step, batch=4).expert)
        pairs.append((first == second).double().mean())
    assert abs(float(torch.stack(pairs).mean()) - 1 / E) < 0.25


def test_the_ensemble_takes_all_experts_alike_in_evaluation_only() -> None:
    routing = route(evaluation="ensemble", training=False)
    assert routing.top_k == E and bool((routing.weight == 1 / E).all())
    assert route(evaluation="ensemble").top_k == 1


def test_even_probabilities_are_stated() -> None:
    routing = route()
    assert_close(routing.probs, torch.full((B * S, E), 1 / E, dtype=torch.float64), "layout")


def test_a_repeated_context_shares_what_is_recorded_and_keeps_means() -> None:
    totals = {"token": 10.0, "sequence": 2.0, "micro_step": 1.0}
    valid = torch.tensor([True] * 4 + [True] * 3 + [False])
    ctx = ForwardContext(batch_size=2, seq_len=4, valid=valid, totals=totals, training=True)
    twice = ctx.repeated(2)
    for scope in ("token", "sequence", "micro_step", "rank"):
        assert_close(twice.at("a").share(scope), ctx.at("a").share(scope), "layout")  # type: ignore[arg-type]
    twice.add_loss("x", torch.ones(()))
    assert ctx.losses["x"] == 1 and twice.statistics is ctx.statistics and twice.batch_size == 4
