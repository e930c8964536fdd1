"""MoE++: scores that travel through the layers, and what loss and capacity give to each kind of expert."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moetrain.moe.capacity.by_kind import SlotsByKindConfig
from moetrain.moe.context import ForwardContext
from moetrain.moe.experts import ZeroExpertsConfig
from moetrain.moe.losses.balance import ExpertBalanceConfig
from moetrain.moe.losses.heterogeneous import HeterogeneousBalanceConfig
from moetrain.moe.routers.residual import ResidualTopKRouter, ResidualTopKRouterConfig
from moetrain.moe.routers.topk import TopKRouterConfig
from moetrain.moe.routing import Routing, fixed_routing
from moetrain.testing import assert_close

T, D, E, K = 48, 7, 6, 2
KINDS = ZeroExpertsConfig(num_constant=1, num_copy=1, num_null=1)
COLUMNS = E + KINDS.count


def make(seed: int = 0, **settings: object) -> ResidualTopKRouter:
    router = ResidualTopKRouterConfig(top_k=K, zero_experts=KINDS, **settings).build(D, E, dtype=torch.float64)  # type: ignore[arg-type]
    for parameter in router.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed + parameter.numel()))
    return router


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def context() -> ForwardContext:
    return ForwardContext(batch_size=2, seq_len=T // 2, training=True)


def through(routers: list[ResidualTopKRouter], ctx: ForwardContext) -> list[Routing]:
    return [router(inputs(i), ctx.at(f"layers.{i}")) for i, router in enumerate(routers)]


def test_scores_of_the_layer_before_are_added_through_a_matrix() -> None:
    routers = [make(i) for i in range(3)]
    first, second, third = (routing.logits for routing in through(routers, context()))
    assert_close(first, inputs(0) @ routers[0].weight.T, "layout")
    assert_close(second, inputs(1) @ routers[1].weight.T + first @ routers[1].residual.T, "layout")
    assert_close(third, inputs(2) @ routers[2].weight.T + second @ routers[2].residual.T, "layout")
    third.square().sum().backward()
    assert routers[0].residual.grad is None
    assert all(bool(router.weight.grad.abs().sum() > 0) for router in routers)


def test_without_residual_matrices_it_is_the_plain_router() -> None:
    routers = [make(i) for i in range(2)]
    for i, (router, routing) in enumerate(zip(routers, through([*map(zeroed, routers)], context()), strict=True)):
        plain = TopKRouterConfig(top_k=K, zero_experts=KINDS).build(D, E, dtype=torch.float64)
        plain.load_state_dict({"weight": router.weight})
        expected = plain(inputs(i), context().at("layers.0"))
        assert torch.equal(routing.expert, expected.expert)
        assert_close(routing.weight, expected.weight, "layout")


def zeroed(router: ResidualTopKRouter) -> ResidualTopKRouter:
    assert router.initial == {"residual": 0.0}
    nn.init.zeros_(router.residual)
    return router


def test_scores_may_come_from_two_layers_and_be_scaled_to_a_deviation() -> None:
    router = make(hidden_multiple=2, standard_deviation=0.5)
    assert router.hidden is not None and router.weight.shape == (COLUMNS, 2 * COLUMNS)
    raw = torch.tanh(inputs() @ router.hidden.T) @ router.weight.T
    routing = router(inputs(), context().at("layers.0"))
    assert_close(routing.logits, 0.5 * raw / raw.std(dim=1, keepdim=True), "layout")


def test_released_weights_leave_the_null_expert_out() -> None:
    routing = make(renormalise=True, renormalise_null=False)(inputs(), context().at("layers.0"))
    null = routing.expert_TK == COLUMNS - 1
    assert bool(null.any())
    assert bool((routing.weight_TK[null.flip(1)] == 1).all()) and bool((routing.weight_TK[null] == 0).all())


def skewed(share: float) -> Routing:
    """One choice per token; a zero-computation expert has ``share`` times the choices and probability of another."""
    per = torch.tensor([4.0] * E + [4.0 * share] * KINDS.count, dtype=torch.float64)
    expert = torch.repeat_interleave(torch.arange(COLUMNS), per.long())
    probs = (per / per.sum()).expand(len(expert), COLUMNS).clone().requires_grad_()
    return fixed_routing(expert[:, None], probs[:, :1], num_experts=E, num_columns=COLUMNS, probs=probs)


@pytest.mark.parametrize("tau", [0.25, 0.5, 1.0])
def test_loss_value_at_uniform_load_and_its_balance(tau: float) -> None:
    loss = HeterogeneousBalanceConfig(tau=tau, scope="rank").build()

    def value(share: float) -> Tensor:
        routing = skewed(share)
        return loss(routing, ForwardContext(batch_size=1, seq_len=routing.num_tokens, training=True).at("layers.0"))

    expected = (E + tau * KINDS.count) / COLUMNS**2
    assert_close(value(1.0), torch.tensor(expected, dtype=torch.float64), "layout")
    shares = [0.5, 1.0, 2.0, 4.0, 8.0]
    assert min(shares, key=lambda share: float(value(share).detach())) == 1 / tau
    # balanced shares make every expert's pull on the probabilities the same
    routing = skewed(1 / tau)
    loss(routing, ForwardContext(batch_size=1, seq_len=routing.num_tokens, training=True).at("layers.0")).backward()
    assert_close(routing.probs.grad, routing.probs.grad[:1, :1].expand_as(routing.probs.grad), "layout")


def test_without_a_preference_for_zero_computation_experts_it_is_the_balance_loss_over_their_number() -> None:
    routing, ctx = make()(inputs(), context().at("layers.0")), context().at("layers.0")
    plain = ExpertBalanceConfig(normalisation="per_token").build()(routing, ctx)
    assert_close(HeterogeneousBalanceConfig(tau=1.0).build()(routing, ctx), plain / COLUMNS, "layout")


@pytest.mark.parametrize("tau", [0.25, 1.0])
def test_capacities_add_up_to_factor_times_tokens(tau: float) -> None:
    of_expert, of_zero = SlotsByKindConfig(tau=tau).build().divisors(E, KINDS.count)
    assert E / of_expert + KINDS.count / of_zero == pytest.approx(1)
    assert of_expert / of_zero == pytest.approx(1 / tau)


def test_slots_by_kind() -> None:
    routing = make()(inputs(), context().at("layers.0"))
    ctx = ForwardContext(batch_size=1, seq_len=T, training=True).at("layers.0")
    settings = dict(factor=0.5, tau=0.5)
    executed = SlotsByKindConfig(**settings).build()(routing, ctx)  # type: ignore[arg-type]
    limit = torch.tensor([4] * E + [8] * KINDS.count)  # 0.5 * 2 * 48 * (0.5 or 1) / (0.5 * 6 + 3)
    assert torch.equal(executed.dispatched, torch.minimum(routing.selected, limit))
    assert bool((routing.selected > limit)[:E].any()) and bool((routing.selected > limit)[E:].any())
    free = SlotsByKindConfig(**settings, limit_zero=False).build()(routing, ForwardContext(batch_size=1, seq_len=T).at("l"))  # type: ignore[arg-type]
    assert torch.equal(free.dispatched[E:], routing.selected[E:]) and torch.equal(free.dispatched[:E], executed.dispatched[:E])


def test_parts_that_need_zero_computation_experts_say_so() -> None:
    plain = TopKRouterConfig(top_k=1)
    for config in (HeterogeneousBalanceConfig(), SlotsByKindConfig()):
        (problem,) = config.check("here", num_experts=E, router=plain)
        assert "zero_experts" in str(problem)
        assert not list(config.check("here", num_experts=E, router=TopKRouterConfig(top_k=1, zero_experts=KINDS)))
