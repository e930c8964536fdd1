"""Dense-to-sparse gates: both ends of the temperature, what is identifiable, schedules, evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetrain.config import load
from moetrain.moe.context import ForwardContext, RouterContext
from moetrain.moe.losses.balance import GateBalanceConfig
from moetrain.moe.routers.dense_to_sparse import DenseToSparseRouter, DenseToSparseRouterConfig
from moetrain.testing import assert_close

T, D, E = 200, 5, 6


def make(**settings: Any) -> DenseToSparseRouter:
    router = DenseToSparseRouterConfig(**settings).build(D, E, dtype=torch.float64)
    for parameter in router.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    return router


def context(**kwargs: Any) -> RouterContext:
    return ForwardContext(**{"batch_size": 1, "seq_len": T, "training": True, **kwargs}).at("layers.0")


def inputs() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def test_cold_it_takes_the_best_of_the_noisy_logits_whole() -> None:
    for noisy in (True, False):
        router = make(decay="constant", temperature=1e-5, noise=noisy)
        routing = router(inputs(), context())
        assert routing.expert.numel() == T and float(routing.weight.detach().min()) > 0.98
        agree = (routing.expert == router.logits(inputs()).argmax(1)).double().mean()
        assert (agree == 1) if not noisy else (0.3 < agree < 1)


def test_hot_it_takes_all_experts_alike() -> None:
    routing = make(decay="constant", temperature=1e9)(inputs(), context())
    assert routing.expert.numel() == T * E and routing.slot.max() == E - 1
    assert_close(routing.weight.float(), torch.full((T * E,), 1 / E), "layout")
    assert_close(GateBalanceConfig().build()(routing, context()).float(), torch.tensor(float(E)), "layout")


def test_fewer_experts_as_it_cools() -> None:
    counts = [make(decay="constant", temperature=t, threshold=0.01)(inputs(), context()).expert.numel() for t in (4, 2, 1, 0.5, 0.2, 0.05)]
    assert counts == sorted(counts, reverse=True) and counts[0] > 5 * counts[-1]


def test_only_an_activation_makes_the_temperature_identifiable() -> None:
    for activation in ("linear", "sigmoid", "tanh", "gelu", "silu"):
        router = make(activation=activation, logit_bias=True, decay="learned", noise=False)
        before = router(inputs(), context()).probs
        with torch.no_grad():
            router.weight.mul_(3)
            router.bias.mul_(3)  # type: ignore[union-attr]
            router.log_temperature.add_(torch.tensor(3.0, dtype=torch.float64).log())  # type: ignore[union-attr]
        change = float((router(inputs(), context()).probs - before).detach().abs().max())
        assert (change < 1e-12) == (activation == "linear")
        assert_close(before.sum(1), torch.ones(T, dtype=torch.float64), "layout")


def test_the_schedule_is_a_function_of_the_step_and_travels_in_the_state() -> None:
    router = make(temperature=2.0, final_temperature=0.5, decay="linear", decay_steps=10, hard_after=12)
    temperatures = []
    for step in (0, 5, 10, 15):
        router.begin_step(step, 100)
        temperatures.append(float(router.temperature()))
        assert router.hard == (step >= 12)
    assert temperatures == [2.0, 1.25, 0.5, 0.5]
    resumed = make(temperature=2.0, final_temperature=0.5, decay="linear", decay_steps=10)
    resumed.load_state_dict(router.state_dict())
    assert float(resumed.temperature()) == 0.5


def test_evaluation_is_free_of_noise() -> None:
    for evaluation, experts in (("best", 1), ("all", E)):
        router = make(evaluation=evaluation)
        routing = router(inputs(), context(training=False))
        probs = torch.softmax(router.logits(inputs()), dim=1)
        assert_close(routing.weight.detach(), probs.detach().topk(experts).values.sort(1).values.flatten() if experts == 1
                     else probs.detach().flatten(), "layout")  # fmt: skip
    soft = make(evaluation="threshold", decay="constant", temperature=0.7)
    expected = make(noise=False, decay="constant", temperature=0.7)
    assert_close(soft(inputs(), context(training=False)).weight, expected(inputs(), context()).weight, "exact")


@pytest.mark.parametrize("scope", ["sequence", "rank"])
def test_gradient_of_the_loss_is_that_of_finite_differences(scope: str) -> None:
    router, logits = make(noise=False, decay="constant", threshold=0.1), torch.randn(12, E, dtype=torch.float64, requires_grad=True)
    valid = torch.arange(12) % 6 < torch.tensor([6, 3]).repeat_interleave(6)

    def loss(z: Tensor) -> Tensor:
        ctx = context(batch_size=2, seq_len=6, valid=valid)
        return GateBalanceConfig(scope=scope).build()(router.route(z, ctx), ctx)

    assert torch.autograd.gradcheck(loss, (logits,))
    assert bool((torch.autograd.grad(loss(logits), logits)[0][~valid] == 0).all())


def test_a_threshold_that_would_leave_even_scores_without_expert_is_named() -> None:
    config = load(DenseToSparseRouterConfig, {"threshold": 0.125}, path="router")
    assert [p.field for p in config.check("router", num_experts=8)] == ["router.threshold"]
    assert not list(config.check("router", num_experts=7))
