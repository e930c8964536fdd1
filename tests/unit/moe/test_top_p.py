"""Top-p routing: the smallest set that covers the threshold, its limits, and its losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from moetrain.config import load
from moetrain.errors import ConfigError
from moetrain.moe.context import ForwardContext, RouterContext
from moetrain.moe.losses.balance import ExpertBalanceConfig
from moetrain.moe.losses.entropy import EntropyConfig
from moetrain.moe.routers.top_p import TopPRouter, TopPRouterConfig
from moetrain.moe.routing import Routing
from moetrain.testing import assert_close

T, D, E = 40, 7, 8


def make(**settings: float) -> TopPRouter:
    router = TopPRouterConfig(**settings).build(D, E, dtype=torch.float64)  # type: ignore[arg-type]
    nn.init.normal_(router.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    return router


def context(**kwargs: object) -> RouterContext:
    return ForwardContext(batch_size=2, seq_len=T // 2, training=True, **kwargs).at("layers.0")  # type: ignore[arg-type]


def inputs() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def members(routing: Routing) -> Tensor:
    return torch.zeros(T, E, dtype=torch.bool).index_put((routing.token, routing.expert), torch.tensor(True))


@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.75, 0.95])
def test_the_set_is_the_smallest_that_exceeds_the_threshold(threshold: float) -> None:
    routing = make(threshold=threshold)(inputs(), context())
    chosen, probs = members(routing), routing.probs.detach()
    mass = torch.where(chosen, probs, 0.0).sum(1)
    least = torch.where(chosen, probs, torch.inf).amin(1)
    assert bool(((mass > threshold) | chosen.all(1)).all())
    assert bool((mass - least <= threshold).all())
    assert bool((torch.where(chosen, 0.0, probs).amax(1) <= least).all())
    assert_close(routing.weight, probs[routing.token, routing.expert], "exact")
    assert len(set(chosen.sum(1).tolist())) > 1


def test_zero_is_top_1_and_one_is_all_experts() -> None:
    x = inputs()
    one, everyone = make(threshold=0.0)(x, context()), make(threshold=1.0)(x, context())
    assert torch.equal(one.expert, one.probs.argmax(1)) and one.expert.numel() == T
    assert everyone.expert.numel() == T * E
    # float32 sums of all but the last may round to 1 and above
    confident = torch.softmax(100 * torch.randn(T, E, generator=torch.Generator().manual_seed(2)), dim=1)
    assert bool(make(threshold=1.0).select(confident).all())


@pytest.mark.parametrize("threshold", [0.3, 0.4, 0.9])
def test_a_uniform_router_takes_floor_pE_plus_1_experts(threshold: float) -> None:
    router = make(threshold=threshold)
    nn.init.zeros_(router.weight)
    routing, ctx = router(inputs(), context()), context()
    k = math.floor(threshold * E) + 1
    assert bool((members(routing).sum(1) == k).all())
    assert_close(EntropyConfig().build()(routing, ctx), torch.tensor(math.log(E), dtype=torch.float64), "layout")
    per_token = ExpertBalanceConfig(normalisation="per_token", scope="rank").build()
    assert_close(per_token(routing, ctx), torch.tensor(float(k), dtype=torch.float64), "layout")
    per_choice = ExpertBalanceConfig(scope="rank").build()
    assert_close(per_choice(routing, ctx), torch.tensor(1.0, dtype=torch.float64), "layout")


def test_a_limit_keeps_the_most_probable_experts() -> None:
    free, limited = make(threshold=0.95)(inputs(), context()), make(threshold=0.95, max_experts=2)(inputs(), context())
    assert int(torch.bincount(limited.token).max()) == 2 < int(torch.bincount(free.token).max())
    best = free.slot < 2
    assert torch.equal(limited.token, free.token[best]) and torch.equal(limited.expert, free.expert[best])


def test_padding_tokens_take_no_expert_and_count_in_no_loss() -> None:
    valid = torch.arange(T) % 3 != 0
    routing, ctx = make(threshold=0.6)(inputs(), context(valid=valid)), context(valid=valid)
    assert bool(valid[routing.token].all())
    expected = torch.special.entr(routing.probs[valid]).sum(1).mean()
    assert_close(EntropyConfig().build()(routing, ctx), expected, "layout")


def test_weights_and_losses_have_the_gradient_of_finite_differences() -> None:
    router, x, ctx = make(threshold=0.6), inputs(), context()
    mask = members(router(x, ctx))
    entropy, balance = EntropyConfig().build(), ExpertBalanceConfig(normalisation="per_token").build()
    cotangent = torch.randn(T, E, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def value(weight: Tensor) -> Tensor:
        with torch.no_grad():
            router.weight.copy_(weight)
        routing = torch.func.functional_call(router, {"weight": weight}, (x, context()))
        assert torch.equal(members(routing), mask)
        return torch.stack(
            [(routing.weight * cotangent[routing.token, routing.expert]).sum(), entropy(routing, ctx), balance(routing, ctx)]
        )

    assert torch.autograd.gradcheck(value, router.weight.detach().clone().requires_grad_(), eps=1e-6, atol=1e-6, rtol=0)


def test_entropy_of_a_certain_router_has_a_finite_gradient() -> None:
    router = make(threshold=0.4)
    with torch.no_grad():
        router.weight.mul_(1e4)
    EntropyConfig().build()(router(inputs(), context()), context()).backward()
    assert bool(router.weight.grad.isfinite().all())


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"router\.threshold = 1\.5"):
        load(TopPRouterConfig, {"threshold": 1.5}, path="router")
    (problem,) = TopPRouterConfig(max_experts=9).check("router", num_experts=8)
    assert problem.field == "router.max_experts"
