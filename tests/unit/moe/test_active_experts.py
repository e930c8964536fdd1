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
from moetrain.moe.schedules import scheduled_top_k, scheduled_value
from moetrain.testing import assert_close
from moetrain.testing.layouts import Outcome, train_steps
from moetrain.testing.scenarios import SCENARIOS, routed

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


LEARNED: dict[str, dict[str, Any]] = {
    "topk": dict(top_k=2, logit_bias=True),
    "noisy_topk": dict(top_k=2),
    "cosine_topk": dict(top_k=2, projection_size=4),
    "moduleformer": dict(top_k=2, gate_size=5),
    "residual_topk": dict(top_k=2, hidden_multiple=2),
    "recurrent_topk": dict(top_k=2, state_size=5),
    "quantile_topk": dict(top_k=2),
    "comet": dict(num_trees=2, split_bias=True, permutation_steps=3),
    "dselect_k": dict(num_selectors=2),
    "dense_to_sparse": dict(decay="learned", threshold=0.1),
    "sparsemixer": dict(top_k=2),
    "top_p": dict(),
}


@pytest.mark.parametrize("name", LEARNED)
def test_freezing_takes_all_parameters_of_a_router(name: str) -> None:
    """Also those of submodules and of a cell that layers share; the random start is no constant but for those that have one."""

    def trained(steps: int, **settings: Any) -> dict[str, torch.Tensor]:
        made = routed(name, {**LEARNED[name], **settings})
        return weights(train_steps(0, 1, replace(made, steps=steps), "single"))

    def parameters(**settings: Any) -> dict[str, torch.Tensor]:
        made = routed(name, {**LEARNED[name], **settings})
        with torch.device("meta"):
            model = made.model.build(made.parts, vocab_size=made.vocab_size, dtype=made.dtype)
        return {n: p for n, p in model.named_parameters() if ".router." in n}

    names = parameters().keys()
    assert names and not parameters(trained=False)
    at_first, fixed = trained(0), trained(2, trained=False)
    late, early = trained(2, trained_from=0.99), trained(2)
    for key in names:
        assert torch.equal(fixed[key], trained(0, trained=False)[key]), key
        assert torch.equal(late[key], at_first[key]), key
        if at_first[key].unique().numel() > 1:
            assert fixed[key].unique().numel() > 1, key
    assert any(not torch.equal(early[key], at_first[key]) for key in names)


def test_the_temperature_falls_on_its_course_and_is_part_of_the_state() -> None:
    router = make(top_k=2, temperature=0.5, temperature_start=2.0)
    x, ctx = torch.randn(T, D, dtype=torch.float64), ForwardContext(batch_size=1, seq_len=T).at("layers.0")
    for step, temperature in ((0, 2.0), (50, 1.0), (100, 0.5)):
        router.begin_step(step, 100)
        assert float(router.state_dict()["temperature"]) == pytest.approx(temperature)
        routing = router(x, ctx)
        assert_close(routing.probs, (routing.logits / temperature).softmax(1), "layout")
        assert_close(routing.weight_TK, routing.probs.gather(1, routing.expert_TK), "exact")
    fixed = make(top_k=2, temperature=0.5)
    assert "temperature" not in fixed.state_dict()
    assert_close(fixed(x, ctx).weight, routing.weight, "layout")


@pytest.mark.parametrize("course", ["linear", "cosine", "exponential"])
def test_courses_run_from_start_to_end_without_turning(course: Any) -> None:
    for start, end in ((2.0, 0.3), (0.5, 4.0), (1.0, 1.0)):
        path = [scheduled_value(start, end, step, 50, course) for step in range(51)]
        assert path[0] == start and path[-1] == pytest.approx(end)
        assert path in (sorted(path), sorted(path, reverse=True))
    assert scheduled_value(1.0, 3.0, 25, 50, "linear") == scheduled_value(1.0, 3.0, 25, 50, "cosine") == 2.0
    assert scheduled_value(1.0, 4.0, 25, 50, "exponential") == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trained": False, "trained_until": 0.5}, "never trained"),
        ({"trained_from": 0.6, "trained_until": 0.5}, "trained_until"),
        ({"temperature_schedule": "linear"}, r"needs .*temperature_start"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(TopKRouterConfig, {"top_k": 2, **settings})
    found = TopKRouterConfig(top_k=2, top_k_start=9).check("router", num_experts=E)
    assert [problem.field for problem in found] == ["router.top_k_start"]
