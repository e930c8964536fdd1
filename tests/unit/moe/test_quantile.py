"""Quantile balancing: the prices' formula, what they do to the load, and when they change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetrain.config import load
from moetrain.errors import ConfigError
from moetrain.moe.context import ForwardContext, RouterContext
from moetrain.moe.layer import statistics
from moetrain.moe.routers.quantile import QuantileTopKRouter, QuantileTopKRouterConfig, quantile_prices
from moetrain.testing import assert_close

B, S, D, E, K = 4, 64, 6, 8, 2


def context(**kwargs: Any) -> RouterContext:
    return ForwardContext(**{"batch_size": B, "seq_len": S, "training": True, **kwargs}).at("layers.0")


def make(**settings: Any) -> QuantileTopKRouter:
    router = QuantileTopKRouterConfig(**{"top_k": K, **settings}).build(D, E, dtype=torch.float64)
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    return router


def inputs() -> Tensor:
    """Tokens that agree on their favourites."""
    return torch.randn(B * S, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 1.0


def test_prices_are_the_stated_quantiles_of_each_sequence() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(B, S, E, generator=generator, dtype=torch.float64)
    bias = torch.randn(E, generator=generator, dtype=torch.float64) * 0.3
    valid = torch.arange(B * S).view(B, S) % 5 != 2
    valid[3] = False
    prices, counted = quantile_prices(scores, bias, valid, K)
    assert counted.tolist() == [True, True, True, False]
    for group in range(3):
        rows = scores[group][valid[group]].tolist()
        least = [sorted((z + b for z, b in zip(row, bias.tolist(), strict=True)), reverse=True)[K] for row in rows]
        place = len(rows) * K // E
        for expert in range(E):
            margins = sorted((row[expert] - a for row, a in zip(rows, least, strict=True)), reverse=True)
            assert float(prices[group, expert]) == margins[place]


@pytest.mark.parametrize("settings", [{}, {"score": "sigmoid", "renormalise": True}, {"score": "logit", "selected_softmax": True}], ids=str)
def test_a_few_steps_even_out_the_load(settings: dict[str, Any]) -> None:
    router, worst = make(**settings), []
    for _ in range(12):
        ctx = context()
        routing = router(inputs(), ctx)
        worst.append(float(routing.selected.max() / routing.selected.double().mean()))
        router.end_step(statistics(routing, ctx))
    assert worst[0] > 1.8 and worst[-1] < 1.25


def test_the_step_takes_the_mean_over_its_sequences_whatever_their_micro_batch() -> None:
    whole, parts = make(), make()
    ctx = context()
    whole.end_step(statistics(whole(inputs(), ctx), ctx))
    halves = []
    for rows in inputs().chunk(2):
        half = context(batch_size=B // 2)
        halves.append(statistics(parts(rows, half), half))
    parts.end_step(halves[0] + halves[1])
    assert_close(parts.selection_bias, whole.selection_bias, "layout")
    assert "selection_bias" in whole.state_dict()


def test_evaluation_uses_the_prices_and_does_not_count() -> None:
    router, ctx = make(), context()
    router.end_step(statistics(router(inputs(), ctx), ctx))
    evaluated = router(inputs(), context(training=False))
    assert torch.equal(evaluated.expert, router(inputs(), context()).expert) and "step_sums" not in evaluated.aux


def test_settings_that_do_not_fit_are_named() -> None:
    for data, message in (
        ({"selection_bias": False}, r"router\.selection_bias.*must be true"),
        ({"bias_update_rate": 0.1}, r"router\.bias_update_rate.*must be 0"),
        ({"top_k_start": 1}, r"no router\.top_k_start"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(QuantileTopKRouterConfig, {"top_k": K, **data}, path="router")
    assert [p.field for p in QuantileTopKRouterConfig(top_k=E).check("router", num_experts=E)] == ["router.top_k"]
