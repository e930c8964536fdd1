"""AdaMoE's routing: null experts take choices, computed experts share the weight, only the null total is balanced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moetrain.config import load
from moetrain.errors import ConfigError
from moetrain.moe.context import ForwardContext, RouterContext
from moetrain.moe.execution import sort_entries
from moetrain.moe.experts import ZeroExpertsConfig
from moetrain.moe.losses.balance import ExpertBalanceConfig
from moetrain.moe.routers.topk import TopKRouter, TopKRouterConfig
from moetrain.moe.routing import fixed_routing
from moetrain.testing import assert_close

T, D, E, NULL, K = 60, 7, 6, 6, 4


def make(null: int = NULL, **settings: object) -> TopKRouter:
    chosen = {"top_k": K, "renormalise": True, "renormalise_null": not null, **settings}
    router = TopKRouterConfig(zero_experts=ZeroExpertsConfig(num_null=null), **chosen).build(D, E, dtype=torch.float64)  # type: ignore[arg-type]
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    return router


def context() -> RouterContext:
    return ForwardContext(batch_size=2, seq_len=T // 2, training=True).at("layers.0")


def inputs() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_weights_of_computed_experts_sum_to_one_or_there_is_none() -> None:
    routing = make()(inputs(), context())
    computed = routing.expert_TK < E
    some = computed.any(1)
    assert bool(some.any()) and not bool(some.all())
    assert_close(routing.weight_TK.sum(1), some.double(), "layout")
    assert bool((routing.weight_TK[~computed] == 0).all())
    assert bool((computed.sum(1) + (routing.expert_TK >= E).sum(1) == K).all())
    assert sort_entries(routing).entry.numel() == int(computed.sum())


def test_a_token_without_computed_experts_gives_finite_gradients() -> None:
    router = make()
    weight = router(inputs(), context()).weight
    weight.square().sum().backward()
    assert bool(weight.isfinite().all()) and bool(router.weight.grad.isfinite().all())


def test_without_null_experts_it_is_the_renormalised_router() -> None:
    plain = TopKRouterConfig(top_k=K, renormalise=True).build(D, E, dtype=torch.float64)
    nn.init.normal_(plain.weight, generator=torch.Generator().manual_seed(0))
    ours, expected = make(null=0)(inputs(), context()), plain(inputs(), context())
    assert torch.equal(ours.expert, expected.expert) and torch.equal(ours.weight, expected.weight)


def test_null_logits_matter_only_through_the_choice_and_learn_only_from_the_loss() -> None:
    router, ctx = make(), context()
    logits = router.logits(inputs()).detach()
    moved = logits.clone()
    chosen = torch.zeros(T, E + NULL, dtype=torch.bool).scatter_(1, router.route(logits, ctx).expert_TK, True)
    moved[:, E:] += torch.where(chosen[:, E:], 0.7, -0.7)
    before, after = router.route(logits, context()), router.route(moved, context())
    weight = [torch.zeros(T, E + NULL, dtype=torch.float64).scatter(1, r.expert_TK, r.weight_TK) for r in (before, after)]
    assert_close(weight[1], weight[0], "layout")

    routing = router(inputs(), ctx)
    (routing.weight * torch.linspace(-1, 1, T * K, dtype=torch.float64)).sum().backward()
    assert float(router.weight.grad[E:].abs().max()) < 1e-12 < float(router.weight.grad[:E].abs().max())
    ExpertBalanceConfig(pool_zero=True).build()(router(inputs(), ctx), ctx).backward()
    assert float(router.weight.grad[E:].abs().max()) > 1e-6


@pytest.mark.parametrize("spread", [False, True])
def test_only_the_total_of_null_choices_counts(spread: bool) -> None:
    """1 at uniform load, also where all null choices fall on one null expert."""
    columns = E + NULL
    token = torch.arange(columns)
    null = E + token % NULL if spread else torch.full_like(token, E)
    probs = torch.full((columns, columns), 1 / columns, dtype=torch.float64)
    probs[:, E] *= 1.5
    probs[:, -1] *= 0.5
    routing = fixed_routing(
        torch.stack([token % E, null], dim=1), probs[:, :2], num_experts=E, num_columns=columns, logits=probs.log(), probs=probs
    )
    ctx = ForwardContext(batch_size=1, seq_len=columns, training=True).at("layers.0")
    one = torch.tensor(1.0, dtype=torch.float64)
    assert_close(ExpertBalanceConfig(pool_zero=True).build()(routing, ctx), one, "layout")
    assert bool(ExpertBalanceConfig().build()(routing, ctx) > 1.01) is not spread


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"router\.renormalise_null = False: needs .*zero_experts\.num_null > 0"):
        load(TopKRouterConfig, {"top_k": 2, "renormalise": True, "renormalise_null": False}, path="router")
    (problem,) = ExpertBalanceConfig(pool_zero=True).check("loss.a", num_experts=4, router=TopKRouterConfig(top_k=1))
    assert problem.field == "loss.a.pool_zero"
