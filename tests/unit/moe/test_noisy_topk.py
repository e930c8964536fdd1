"""Noisy top-k with its importance and load losses: where the noise is, what the losses measure, their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetrain.config import load
from moetrain.errors import ConfigError
from moetrain.moe.context import ForwardContext, RouterContext
from moetrain.moe.losses.variation import ImportanceConfig, LoadConfig, chance_of_choice
from moetrain.moe.routers.noisy import NoisyTopKRouter, NoisyTopKRouterConfig
from moetrain.moe.routers.topk import TopKRouterConfig
from moetrain.testing import assert_close

D, E, K, B, S = 6, 8, 2, 4, 5
LOSSES = [ImportanceConfig, LoadConfig]


def context(batch: int = B, seq: int = S, **kwargs: Any) -> RouterContext:
    return ForwardContext(**{"batch_size": batch, "seq_len": seq, "training": True, **kwargs}).at("layers.0")


def make(top_k: int = K, **settings: Any) -> NoisyTopKRouter:
    router = NoisyTopKRouterConfig(top_k=top_k, **settings).build(D, E, dtype=torch.float64)
    for parameter in router.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    return router


def inputs(tokens: int = B * S) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def test_noise_is_in_training_only_and_the_router_starts_without_a_preference() -> None:
    router = make()
    evaluated = router(inputs(), context(training=False))
    assert torch.equal(evaluated.logits, router.logits(inputs())) and not evaluated.aux
    trained = router(inputs(), context())
    assert not torch.equal(trained.logits, evaluated.logits)
    assert_close(trained.aux["clean_logits"], evaluated.logits, "layout")  # of one product with the noise's matrix: other rounding
    for parameter in router.parameters():
        nn.init.zeros_(parameter)
    started = router(inputs(4000), context(40, 100))
    assert set(router.initial) == {name for name, _ in router.named_parameters()}
    assert abs(started.selected.double() / (4000 * K / E) - 1).max() < 0.15


def test_load_is_how_often_an_expert_is_chosen_when_its_noise_is_drawn_again() -> None:
    routing = make()(inputs(), context())
    generator, draws = torch.Generator().manual_seed(0), 4000
    expected = torch.zeros(B * S, E, dtype=torch.float64)
    for expert in range(E):
        drawn = routing.logits.detach().repeat(draws, 1, 1)
        fresh = torch.randn(draws, B * S, generator=generator, dtype=torch.float64) * routing.aux["noise_std"][:, expert]
        drawn[:, :, expert] = routing.aux["clean_logits"][:, expert] + fresh
        expected[:, expert] = (drawn.topk(K, dim=2).indices == expert).any(2).double().mean(0)
    assert (chance_of_choice(routing) - expected).abs().max() < 0.04  # five deviations of a mean of that many draws


def test_all_experts_for_every_token_is_balanced_load() -> None:
    routing = make(top_k=E)(inputs(), context())
    assert LoadConfig().build()(routing, context()).item() == 0


@pytest.mark.parametrize("scope", ["sequence", "micro_step"])
@pytest.mark.parametrize("config", LOSSES)
def test_gradient_is_that_of_finite_differences(config: Any, scope: str) -> None:
    router, loss = make(), config(scope=scope).build()

    def value(x: Tensor, weight: Tensor, noise_weight: Tensor) -> Tensor:
        router.weight.data, router.noise_weight.data = weight.detach(), noise_weight.detach()
        parameters = {"weight": weight, "noise_weight": noise_weight}
        return loss(torch.func.functional_call(router, parameters, (x, context())), context())

    arguments = (inputs().requires_grad_(), *(p.detach().clone().requires_grad_() for p in (router.weight, router.noise_weight)))
    assert torch.autograd.gradcheck(value, arguments, eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("config", LOSSES)
def test_padding_does_not_count(config: Any) -> None:
    valid = torch.arange(B * S) % S < 3
    router, loss, x = make(), config(scope="rank").build(), inputs().requires_grad_()
    ctx = context(valid=valid)
    loss(router(x, ctx), ctx).backward()
    assert bool((x.grad[~valid] == 0).all()) and bool((x.grad[valid] != 0).any())
    moved = torch.where(valid[:, None], x.detach(), 100.0)
    assert_close(loss(router(moved, ctx), ctx), loss(router(x, ctx), ctx), "exact")


def test_a_favourite_costs() -> None:
    router = make()
    values = []
    for strength in (0.0, 1.0, 5.0):
        router.weight.data = torch.zeros(E, D, dtype=torch.float64)
        router.weight.data[0, 0] = strength
        ctx = context(1, 400)
        routing = router(inputs(400).abs(), ctx)
        values.append([config(scope="rank").build()(routing, ctx).item() for config in LOSSES])
    assert values[0] < values[1] < values[2] and values[2][0] > 10 * values[0][0]


def test_settings_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match="learns its noise"):
        load(NoisyTopKRouterConfig, {"top_k": 2, "logit_noise": 1.0})
    problems = [p.expected for p in LoadConfig().check("loss.x", num_experts=1, router=TopKRouterConfig(top_k=1))]
    assert "two experts" in problems[0] and "router=noisy_topk" in problems[1]
