"""Capacity: how many are dropped, who, and what happens to the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.config import load
from moetrain.errors import ConfigError
from moetrain.moe.capacity.by_kind import SlotsByKindConfig
from moetrain.moe.capacity.policies import DeviceBudgetConfig, DroplessConfig, SlotsConfig
from moetrain.moe.context import ForwardContext, RouterContext
from moetrain.moe.routing import PAD, Routing, fixed_routing, ragged_routing
from moetrain.testing import assert_close

B, S, E, K = 3, 10, 5, 2


def context(batch: int = B, seq: int = S, **kwargs: Any) -> RouterContext:
    return ForwardContext(**{"batch_size": batch, "seq_len": seq, "training": True, **kwargs}).at("layers.0")


def make_routing(seed: int = 0, *, valid: Tensor | None = None, columns: int = E) -> Routing:
    """Top-K choices that favour the last columns, with weights that need not sum to one."""
    logits = torch.randn(B * S, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probs = (logits + torch.linspace(-1.5, 1.5, columns)).softmax(1)
    index = probs.topk(K, dim=1).indices
    return fixed_routing(index, probs.gather(1, index), num_experts=E, num_columns=columns, probs=probs, valid=valid)


def per_queue(routing: Routing, groups: int) -> Tensor:
    """[groups, E] entries."""
    size, real = routing.num_tokens // groups, (routing.expert >= 0) & (routing.expert < routing.num_experts)
    queue = (routing.token // size) * routing.num_experts + routing.expert
    return torch.bincount(queue[real], minlength=groups * routing.num_experts).view(groups, -1)


def loop_kept(routing: Routing, groups: int, slots: int, order: list[int]) -> list[bool]:
    """Who gets a slot when the entries are served in this order."""
    kept, used = [False] * len(order), torch.zeros(groups, routing.num_experts, dtype=torch.int64)
    for entry in order:
        expert, group = int(routing.expert[entry]), int(routing.token[entry]) // (routing.num_tokens // groups)
        if expert != PAD and used[group, expert] < slots:
            kept[entry] = True
            used[group, expert] += 1
    return kept


def test_dropless_is_the_routing_itself() -> None:
    routing = make_routing()
    assert DroplessConfig().build()(routing, context()) is routing


PRIORITIES = ["position", "probability", "first_probability", "token", "random"]


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("scope", ["sequence", "rank"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3, 7, 100])
def test_exactly_what_exceeds_the_slots_is_dropped(slots: int, padded: bool, scope: str, priority: str) -> None:
    valid = torch.arange(B * S) % 4 != 1 if padded else None
    routing, groups = make_routing(slots, valid=valid), B if scope == "sequence" else 1
    executed = SlotsConfig(tokens=slots, scope=scope, priority=priority).build()(routing, context(valid=valid))
    chosen, kept = per_queue(routing, groups), per_queue(executed, groups)
    assert torch.equal(chosen - kept, (chosen - slots).clamp_min(0))
    assert torch.equal(executed.dispatched, kept.sum(0)) and torch.equal(executed.selected, routing.selected)
    dropped = executed.expert == PAD
    assert bool((executed.weight[dropped] == 0).all()) and torch.equal(executed.weight[~dropped], routing.weight[~dropped])


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_who_is_served_first(groups: int, priority: str) -> None:
    routing = make_routing(4)
    best = routing.probs.max(1).values
    draws = context().uniform("random_token_selection", E)
    keys = {
        "position": lambda n: (int(routing.slot[n]), int(routing.token[n])),
        "probability": lambda n: (-float(routing.weight[n]), n),
        "first_probability": lambda n: (int(routing.slot[n]), -float(best[routing.token[n]])),
        "token": lambda n: (int(routing.token[n]), n),
        "random": lambda n: -float(draws[routing.token[n], routing.expert[n]]),
    }
    order = sorted(range(routing.expert.numel()), key=keys[priority])
    executed = SlotsConfig(tokens=2, scope="rank", num_groups=groups, priority=priority).build()(routing, context())
    assert (executed.expert != PAD).tolist() == loop_kept(routing, groups, 2, order)


def test_ragged_routings_are_cut_the_same_way() -> None:
    generator = torch.Generator().manual_seed(0)
    selected = torch.rand(B * S, E, generator=generator) < 0.6
    routing = ragged_routing(selected, torch.rand(B * S, E, generator=generator), num_experts=E)
    executed = SlotsConfig(tokens=3, scope="sequence").build()(routing, context())
    assert torch.equal(per_queue(executed, B), per_queue(routing, B).clamp_max(3))
    order = sorted(range(routing.expert.numel()), key=lambda n: (int(routing.slot[n]), int(routing.token[n])))
    assert (executed.expert != PAD).tolist() == loop_kept(routing, B, 3, order)


@pytest.mark.parametrize("config", [SlotsConfig, SlotsByKindConfig])
def test_slots_of_a_ragged_routing_do_not_depend_on_the_choices_of_other_sequences(config: Any) -> None:
    """The second sequence makes three times the choices of the first."""
    selected = torch.zeros(2 * S, E, dtype=torch.bool)
    selected[:S, :1], selected[S:, :3] = True, True
    weight, policy = torch.ones(2 * S, E), config(factor=1.0).build()
    whole = policy(ragged_routing(selected, weight, num_experts=E), context(2))
    assert per_queue(whole, 2).tolist() == [[2, 0, 0, 0, 0], [6, 6, 6, 0, 0]]  # 10 tokens * 1 or 3 choices / 5 experts
    for part in range(2):
        rows = slice(part * S, (part + 1) * S)
        alone = policy(ragged_routing(selected[rows], weight[rows], num_experts=E), context(1))
        assert torch.equal(per_queue(alone, 1), per_queue(whole, 2)[part : part + 1])


def test_sequence_scope_does_not_depend_on_the_cut_of_the_batch() -> None:
    routing, policy = make_routing(), SlotsConfig(factor=0.8, scope="sequence").build()
    whole = policy(routing, context())
    for row in range(B):
        entries = slice(row * S * K, (row + 1) * S * K)
        alone = fixed_routing(routing.expert[entries].view(S, K), routing.weight[entries].view(S, K), num_experts=E)
        assert torch.equal(policy(alone, context(batch=1)).expert, whole.expert[entries])


@pytest.mark.parametrize(
    ("settings", "group", "expected"),
    [
        ({"factor": 1.0}, 10, 4),  # 10 * 2 / 5
        ({"factor": 1.1}, 10, 5),  # 4.4
        ({"factor": 1.1, "round": "down"}, 10, 4),
        ({"factor": 1.25, "choices": 1}, 10, 3),  # 2.5
        ({"factor": 0.01}, 10, 1),
        ({"factor": 1.0, "multiple": 8}, 10, 8),
        ({"tokens": 3}, 10, 3),
        ({"tokens": 3, "multiple": 2}, 10, 4),
        ({"factor": 1.0, "minimum": 4}, 10, 4),
        ({"factor": 1.0, "minimum": 5}, 10, 5),
        ({"factor": 1.0, "minimum": 5, "multiple": 4}, 10, 8),
        ({"factor": 1.3, "round": "per_choice"}, 11, 6),  # 2 * int(1.3 * 3); together 5.7
        ({"factor": 1.3, "round": "per_choice", "choices": 1}, 11, 3),
        ({"factor": 0.1, "round": "per_choice"}, 10, 1),
        ({"factor": 0.75, "choices": 1, "round": "down", "multiple": 4}, 25, 4),  # GLaM: 3.75 -> 3 -> 4
    ],
)
def test_slots_per_expert(settings: dict[str, Any], group: int, expected: int) -> None:
    assert SlotsConfig(**settings).build().capacity(group, K, E, training=True) == expected


def test_evaluation_may_have_other_slots_or_none() -> None:
    routing, evaluation = make_routing(), context(training=False)
    assert SlotsConfig(tokens=1, evaluation="none").build()(routing, evaluation) is routing
    same = SlotsConfig(tokens=1).build()
    assert torch.equal(same(routing, evaluation).expert, same(routing, context()).expert)
    fraction = SlotsConfig(tokens=1, scope="rank", evaluation_fraction=0.25).build()
    assert int(fraction(routing, evaluation).dispatched.max()) == 8  # ceil(0.25 * 30)
    assert int(fraction(routing, context()).dispatched.max()) == 1


def test_kept_weights_are_renormalised_where_asked() -> None:
    routing = make_routing()
    executed = SlotsConfig(tokens=2, renormalise=True).build()(routing, context())
    total, kept = executed.weight_TK.sum(1), (executed.expert_TK != PAD).sum(1)
    assert set(kept.tolist()) == {0, 1, 2}
    assert_close(total, (kept > 0).double(), "layout")


def test_a_renormalised_survivor_is_one_whatever_its_score() -> None:
    weight = torch.tensor([[0.6, 0.4], [0.7, 0.3]], dtype=torch.float64, requires_grad=True)
    routing = fixed_routing(torch.tensor([[0, 1], [0, 2]]), weight, num_experts=3)
    executed = SlotsConfig(tokens=1, renormalise=True).build()(routing, context(batch=1, seq=2))
    assert executed.weight_TK.tolist() == [[pytest.approx(0.6), pytest.approx(0.4)], [0, 1]]
    executed.weight_TK[:, 1].sum().backward()
    # d(w1 / (w0 + w1)) = (-w1, w0) / (w0 + w1)^2; the survivor of token 1 is constant
    assert_close(weight.grad, torch.tensor([[-0.4, 0.6], [0, 0]], dtype=torch.float64), "layout")


def test_zero_computation_experts_have_no_capacity() -> None:
    routing = make_routing(columns=E + 2)
    executed = SlotsConfig(tokens=1, scope="rank").build()(routing, context())
    assert int(routing.selected[E:].sum()) > 2
    assert torch.equal(executed.dispatched[E:], routing.selected[E:])
    assert int(executed.dispatched[:E].max()) == 1


@pytest.mark.parametrize("config", [SlotsConfig(tokens=2), DeviceBudgetConfig(num_devices=E, factor=0.5)])
def test_a_recomputed_pass_drops_the_same(config: Any) -> None:
    ctx, policy = context(), config.build()
    first = policy(make_routing(0), ctx)
    ctx.forward.recomputing = True
    again = policy(make_routing(0).keep(torch.ones(B * S * K, dtype=torch.bool), torch.rand(B * S * K, dtype=torch.float64)), ctx)
    assert torch.equal(first.expert, again.expert)


def test_groups_belong_to_the_rank_scope() -> None:
    with pytest.raises(ConfigError, match=r"capacity\.num_groups.*needs capacity\.scope=rank"):
        load(SlotsConfig, {"num_groups": 2}, path="capacity")


@pytest.mark.parametrize("factor", [0.37, 1.0, 2.0])
@pytest.mark.parametrize("devices", [1, 5])
def test_each_device_keeps_the_best_weights_within_its_budget(devices: int, factor: float) -> None:
    valid = torch.arange(B * S) % 7 != 0
    routing = make_routing(2, valid=valid)
    executed = DeviceBudgetConfig(num_devices=devices, factor=factor).build()(routing, context(valid=valid))
    budget = int(factor * int(valid.sum()) * K / devices)
    for device in range(devices):
        mine = routing.expert // (E // devices) == device
        mine &= routing.expert != PAD
        kept = mine & (executed.expert != PAD)
        assert int(kept.sum()) == min(int(mine.sum()), budget)
        if bool((mine & ~kept).any()) and bool(kept.any()):
            assert float(routing.weight[kept].min()) >= float(routing.weight[mine & ~kept].max())


def test_exempt_sequences_keep_everything_and_use_up_the_budget() -> None:
    routing = make_routing()
    policy = DeviceBudgetConfig(num_devices=E, factor=0.5).build()
    exempt = torch.arange(B * S) // S == 1
    kept = policy.kept(routing, exempt)
    assert bool(kept[exempt[routing.token]].all()) and not bool(kept.all())
    budget = int(0.5 * B * S * K / E)
    spared = torch.bincount(routing.expert[exempt[routing.token]], minlength=E)
    assert torch.equal(torch.bincount(routing.expert[kept], minlength=E), torch.maximum(spared, routing.selected.clamp_max(budget)))


def test_exempt_sequences_are_drawn_whole_and_independently_of_the_cut() -> None:
    policy = DeviceBudgetConfig(num_devices=E, exempt_fraction=0.3).build()
    many = context(batch=400, seq=4, sample=torch.arange(400))
    exempt = policy.exempt(many, torch.device("cpu")).view(400, 4)
    assert bool((exempt == exempt[:, :1]).all()) and 80 < int(exempt[:, 0].sum()) < 160
    part = policy.exempt(context(batch=10, seq=4, sample=torch.arange(20, 30)), torch.device("cpu")).view(10, 4)
    assert torch.equal(part, exempt[20:30])


def test_nothing_exceeds_a_device_in_evaluation() -> None:
    routing = make_routing()
    assert DeviceBudgetConfig(num_devices=E, factor=0.1).build()(routing, context(training=False)) is routing


def test_the_budget_needs_equal_devices() -> None:
    (problem,) = DeviceBudgetConfig(num_devices=3).check("capacity", num_experts=E, router=None)
    assert problem.field == "capacity.num_devices" and "divide the 5 experts" in problem.expected


def test_decoding_one_token_with_groups_of_a_rank_drops_nothing():
    routing = fixed_routing(torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.4]]), num_experts=E)
    policy = SlotsConfig(scope="rank", num_groups=2).build()
    assert policy(routing, context(1, 1, training=False)).dispatched.sum() == 2


def random_slots(**settings: Any) -> Any:
    return SlotsConfig(priority="random", **settings).build()


def test_random_token_selection_is_fair_to_all_positions() -> None:
    """Half of the tokens find a slot, at each position about as often; position priority keeps the first half."""
    sequences = 400
    expert = torch.zeros(sequences * S, 1, dtype=torch.int64)
    routing = fixed_routing(expert, torch.ones(sequences * S, 1), num_experts=1)
    kept = {
        name: (SlotsConfig(tokens=S // 2, priority=name).build()(routing, context(sequences)).expert != PAD).view(-1, S).sum(0)
        for name in ("random", "position")
    }
    assert kept["position"].tolist() == [sequences] * (S // 2) + [0] * (S // 2)
    assert int(kept["random"].sum()) == sequences * S // 2
    assert float((kept["random"] - sequences / 2).abs().max()) < 40  # 4 standard deviations


def test_random_token_selection_changes_with_the_step_and_not_with_the_cut_of_the_batch() -> None:
    routing, policy = make_routing(), random_slots(tokens=2)
    whole = policy(routing, context(sample=torch.arange(B)))
    assert not torch.equal(whole.expert, policy(routing, context(sample=torch.arange(B), step=1)).expert)
    for row in range(B):
        entries = slice(row * S * K, (row + 1) * S * K)
        alone = fixed_routing(routing.expert[entries].view(S, K), routing.weight[entries].view(S, K), num_experts=E)
        assert torch.equal(policy(alone, context(batch=1, sample=torch.tensor([row]))).expert, whole.expert[entries])


def test_random_token_selection_draws_per_choice_and_spares_zero_computation_experts() -> None:
    valid = torch.arange(B * S) % 4 != 1
    routing = make_routing(columns=E + 2, valid=valid)
    executed = random_slots(tokens=1, scope="rank")(routing, context(valid=valid))
    assert torch.equal(executed.dispatched[E:], routing.selected[E:]) and int(executed.dispatched[:E].max()) == 1


@pytest.mark.parametrize("priority", PRIORITIES)
def test_a_pass_that_recomputes_does_not_draw_again(priority: str) -> None:
    ctx, policy, routing = context(), SlotsConfig(tokens=2, priority=priority).build(), make_routing()
    first = policy(routing, ctx)
    ctx.forward.recomputing, ctx.forward.step = True, 5
    assert torch.equal(policy(routing, ctx).expert, first.expert)


def test_places_number_the_entries_of_each_expert_from_zero() -> None:
    routing, policy = make_routing(), SlotsConfig(scope="sequence").build()
    places = policy.places(routing, context(), group_size=S)
    for queue in {(int(t) // S, int(e)) for t, e in zip(routing.token, routing.expert, strict=True)}:
        mine = (routing.token // S == queue[0]) & (routing.expert == queue[1])
        assert sorted(places[mine].tolist()) == list(range(int(mine.sum())))


def test_the_capacity_factor_moves_to_its_end_which_holds_in_evaluation() -> None:
    expert = torch.zeros(B * S, 1, dtype=torch.int64)
    routing, policy = fixed_routing(expert, torch.ones(B * S, 1), num_experts=1), SlotsConfig(factor=0.2, factor_start=1.0).build()
    kept = [int(policy(routing, context(step=step, total_steps=4)).dispatched.sum()) for step in range(5)]
    assert kept == [B * slots for slots in (10, 8, 6, 4, 2)]
    assert int(policy(routing, context(training=False)).dispatched.sum()) == B * 2
    for data, message in (
        ({"factor_start": 1.0, "tokens": 3}, r"factor_start.*tokens fixes C"),
        ({"factor_schedule": "cosine"}, r"factor_schedule.*needs .*factor_start"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(SlotsConfig, data)
