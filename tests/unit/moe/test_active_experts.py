"""Scheduled numbers of experts, random routers that are never trained, routers frozen for a part of training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from moetrain.config import load
from moetrain.errors import ConfigError
from moetrain.moe.context import ForwardContext
from moetrain.moe.routers.topk import TopKRouter, TopKRouterConfig
from moetrain.moe.schedules import scheduled_top_k
from moetrain.testing import assert_close
from moetrain.testing.layouts import Outcome, train_steps
from moetrain.testing.scenarios import SCENARIOS

D, E, T = 6, 8, 10
RANDOM: dict[str, Any] = dict(score="logit", selected_softmax=True, logit_bias=True, trained=False)


def make(**settings: Any) -> TopKRouter:
    router = TopKRouterConfig(**settings).build(D, E, dtype=torch.float64)
    for tensor in router.state_dict().values():
        nn.init.normal_(tensor, generator=torch.Generator().manual_seed(tensor.numel()))
    return router


@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential", "step"])
@pytest.mark.parametrize(("start", "end"), [(2, 16), (16, 2), (3, 7), (4, 4)])
def test_a_schedule_goes_one_way_from_start_to_end(kind: Any, start: int, end: int) -> None:
    for total in (1, 7, 250, 5000):
        path = [scheduled_top_k(start, end, step, total, kind) for step in range(total)]
        assert path[0] == start and all(min(start, end) <= k <= max(start, end) for k in path)
        assert path in (sorted(path), sorted(path, reverse=True))
        if total == 5000:
            assert abs(path[-1] - end) <= 1


def test_steps_double_in_equal_parts() -> None:
    assert [scheduled_top_k(1, 16, step, 10, "step") for step in range(10)] == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16]
    assert [scheduled_top_k(6, 2, step, 6, "step") for step in range(6)] == [6, 6, 3, 3, 2, 2]


def test_one_expert_has_all_the_weight_and_all_experts_are_the_softmax_mixture() -> None:
    router, x = make(top_k=E, **RANDOM), torch.randn(T, D, dtype=torch.float64)
    ctx = ForwardContext(batch_size=1, seq_len=T).at("layers.0")
    router.top_k = 1
    routing = router(x, ctx)
    assert torch.equal(routing.expert, routing.logits.argmax(1)) and bool((routing.weight == 1).all())
    router.top_k = E
    routing = router(x, ctx)
    assert_close(torch.zeros(T, E, dtype=torch.float64).scatter(1, routing.expert_TK, routing.weight_TK), routing.probs, "layout")


def test_every_step_sets_its_own_number() -> None:
    router = make(top_k=8, top_k_start=2)
    seen = []
    for step in (0, 50, 99, 50):  # a resumed run begins anywhere
        router.begin_step(step, 100)
        seen.append(router.top_k)
    assert seen == [2, 5, 8, 5]


def test_a_random_router_has_no_parameters_but_is_part_of_the_state() -> None:
    router = make(top_k=2, **RANDOM)
    assert not list(router.parameters()) and set(router.state_dict()) == {"weight", "bias"}
    tensor = torch.empty(1000, dtype=torch.float64)
    router.initial["weight"](tensor, torch.Generator().manual_seed(0))  # type: ignore[operator]
    assert tensor.abs().max() <= D**-0.5 and tensor.abs().max() > 0.99 * D**-0.5


def weights(outcome: Outcome) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in outcome.parameters.items() if ".router." in name}


def test_training_does_not_move_a_random_router() -> None:
    scenario = SCENARIOS["random_router"]
    trained, untouched = (weights(train_steps(0, 1, replace(scenario, steps=steps), "single")) for steps in (3, 0))
    assert trained and all(torch.equal(trained[name], untouched[name]) for name in untouched)


def test_a_router_is_trained_in_its_part_of_training_only() -> None:
    """Neither weight decay nor momentum moves it outside."""

    def after(steps: int, **settings: float) -> dict[str, torch.Tensor]:
        scenario = SCENARIOS["deepseek"]
        parts = replace(scenario.parts, router=replace(scenario.parts.router, **settings))
        return weights(train_steps(0, 1, replace(scenario, steps=steps, parts=parts), "single"))

    assert_close(after(2, trained_from=0.9), after(0), "exact")
    assert_close(after(3, trained_until=0.5), after(2), "exact")
    assert all(not torch.equal(after(3)[name], after(2)[name]) for name in after(2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trained": False, "trained_until": 0.5}, "never trained"),
        ({"trained_from": 0.6, "trained_until": 0.5}, "trained_until"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(TopKRouterConfig, {"top_k": 2, **settings})
    found = TopKRouterConfig(top_k=2, top_k_start=9).check("router", num_experts=E)
    assert [problem.field for problem in found] == ["router.top_k_start"]
