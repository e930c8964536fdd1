"""The load and importance loss: its meaning, gradient, scopes and padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moetrain.moe.context import ForwardContext, RouterContext
from moetrain.moe.losses.load_importance import LoadImportanceConfig
from moetrain.moe.routers.topk import TopKRouterConfig
from moetrain.moe.routing import Routing
from moetrain.testing import assert_close

E, K, B, S = 6, 2, 4, 5


def context(batch: int = B, seq: int = S, **kwargs: object) -> RouterContext:
    return ForwardContext(**{"batch_size": batch, "seq_len": seq, "training": True, "sample": torch.arange(batch), **kwargs}).at("layers.0")


def route(logits: Tensor, ctx: RouterContext, noise: float = 3.0) -> Routing:
    return TopKRouterConfig(top_k=K, logit_noise=noise).build(1, logits.shape[1], dtype=torch.float64).route(logits, ctx)


def random_logits(tokens: int = B * S, seed: int = 0) -> Tensor:
    return torch.randn(tokens, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(logits: Tensor, ctx: RouterContext, **settings: str) -> Tensor:
    return LoadImportanceConfig(**settings).build()(route(logits, ctx), ctx)


def test_equal_columns_are_balanced_and_a_favourite_costs() -> None:
    rotated = torch.stack([torch.roll(torch.linspace(0, 2, E, dtype=torch.float64), i) for i in range(E)]).repeat(50, 1)
    ctx = context(1, 50 * E)
    assert float(loss_of(rotated, ctx, scope="rank")) < 0.01
    slope = torch.linspace(1, 0, E, dtype=torch.float64)
    values = [float(loss_of(0.1 * random_logits() + strength * slope, context(), scope="rank")) for strength in (0, 1, 4)]
    assert values == sorted(values) and values[2] > 10 * values[0]


def test_load_is_how_often_fresh_noise_lifts_an_expert_above_the_threshold() -> None:
    """One sequence whose importance is even: what remains is the load, found here by drawing."""
    logits, ctx = random_logits(40), context(1, 40)
    routing = route(logits, ctx)
    value = LoadImportanceConfig(scope="rank").build()(routing, ctx)
    threshold, std = routing.logits.topk(K, dim=1).values[:, -1:], float(routing.aux["noise_std"])
    generator = torch.Generator().manual_seed(1)
    above = torch.stack([logits + std * torch.randn(40, E, generator=generator, dtype=torch.float64) > threshold for _ in range(4000)])
    load, importance = above.double().mean(0).sum(0), logits.softmax(1).sum(0)
    drawn = sum(sums.var() / sums.mean() ** 2 for sums in (load, importance)) / 2
    assert abs(float(value) - float(drawn)) < 0.01 * float(drawn)


@pytest.mark.parametrize("compared", ["logits", "probs"])
@pytest.mark.parametrize("scope", ["sequence", "rank"])
def test_gradient_is_that_of_finite_differences(compared: str, scope: str) -> None:
    logits = random_logits().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss_of(z, context(), compared=compared, scope=scope), (logits,))


def test_padding_does_not_count_and_padding_alone_is_zero() -> None:
    valid = torch.arange(B * S) % S < torch.tensor([5, 3, 0, 4]).repeat_interleave(S)
    logits = random_logits().requires_grad_()
    value = loss_of(logits, context(valid=valid))
    value.backward()
    assert bool((logits.grad[~valid] == 0).all()) and bool((logits.grad[valid] != 0).any())
    alone = [loss_of(logits[row * S : row * S + n], context(1, n, sample=torch.tensor([row]))) for row, n in enumerate([5, 3, 0, 4]) if n]
    assert_close(value, sum(alone) / 3, "layout")
    nothing = random_logits().requires_grad_()
    empty = loss_of(nothing, context(valid=torch.zeros(B * S, dtype=torch.bool)))
    empty.backward()
    assert empty.item() == 0 and bool((nothing.grad == 0).all())


def test_sequence_scope_is_the_mean_of_the_sequences_and_micro_step_is_not() -> None:
    logits = random_logits()
    parts = [loss_of(logits[row * S : (row + 1) * S], context(1, sample=torch.tensor([row]))) for row in range(B)]
    assert_close(loss_of(logits, context()), torch.stack(parts).mean(), "layout")
    whole = loss_of(logits, context(), scope="micro_step")
    assert_close(whole, loss_of(logits, context(), scope="rank"), "exact")
    assert not torch.isclose(whole, torch.stack(parts).mean())


def test_routers_that_do_not_fit_are_named() -> None:
    def problems(experts: int = E, **router: object) -> list[str]:
        return [p.expected for p in LoadImportanceConfig().check("loss.x", num_experts=experts, router=TopKRouterConfig(top_k=1, **router))]

    assert problems(logit_noise=1.0) == []
    assert "noise on its logits" in problems()[0]
    assert "softmax" in problems(logit_noise=1.0, score="sigmoid")[0]
    assert "two experts" in problems(experts=1, logit_noise=1.0)[0]
