"""Dropout of routes: what is dropped how often, what draws together, and what stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.moe.capacity.policies import SlotsConfig
from moetrain.moe.context import ForwardContext, RouterContext
from moetrain.moe.dropout import ExpertDropoutConfig, GatingDropoutConfig, RandomSecondConfig
from moetrain.moe.losses.balance import SwitchBalanceConfig
from moetrain.moe.routing import PAD, Routing, fixed_routing
from moetrain.testing import assert_close

B, S, E, K = 40, 50, 6, 2
ALL = [RandomSecondConfig(factor=1.0), ExpertDropoutConfig(rate=0.4), GatingDropoutConfig(rate=0.5)]


def context(batch: int = B, **kwargs: Any) -> RouterContext:
    return ForwardContext(**{"batch_size": batch, "seq_len": S, "training": True, **kwargs}).at("layers.0")


def routing_of(second: Tensor | float = 0.3, *, columns: int = E, **kwargs: Any) -> Routing:
    """Two different experts per token; the second has this weight."""
    tokens = torch.arange(B * S)
    expert = torch.stack([tokens % columns, (tokens + 1 + tokens // columns % (columns - 1)) % columns], dim=1)
    weight = torch.full((B * S, K), 1.0, dtype=torch.float64)
    weight[:, 1] = second
    return fixed_routing(expert, weight, num_experts=E, num_columns=columns, **kwargs)


def kept(executed: Routing) -> Tensor:
    """[T, K] bool."""
    return executed.expert_TK != PAD


@pytest.mark.parametrize(("weight", "chance"), [(0.1, 0.2), (0.3, 0.6), (0.5, 1.0), (0.7, 1.0)])
def test_the_second_expert_stays_with_a_chance_of_twice_its_weight_and_the_first_always(weight: float, chance: float) -> None:
    stays = kept(RandomSecondConfig().build()(routing_of(weight), context(), "x"))
    assert bool(stays[:, 0].all())
    assert abs(float(stays[:, 1].double().mean()) - chance) <= (0.045 if chance < 1 else 0)  # 4 deviations of 2000 draws


def test_normalisation_before_dropping_keeps_the_first_weight_and_after_it_makes_it_one() -> None:
    dropped = RandomSecondConfig().build()(routing_of(0.25), context(), "x")
    assert bool((dropped.weight_TK[:, 0] == 1).all()) and bool((dropped.weight_TK[:, 1] == 0).any())
    after = SlotsConfig(tokens=B * S, renormalise=True).build()(dropped, context())
    expected = 1 / (1 + 0.25 * kept(dropped)[:, 1].double())
    assert_close(after.weight_TK[:, 0], expected, "layout")


@pytest.mark.parametrize("rescale", [True, False])
def test_expert_output_masking_drops_single_choices_and_keeps_the_mean(rescale: bool) -> None:
    routing = routing_of()
    executed = ExpertDropoutConfig(rate=0.25, rescale=rescale).build()(routing, context(), "x")
    stays = kept(executed)
    assert abs(float(stays.double().mean()) - 0.75) < 0.03
    both = stays.all(1).double().mean()
    assert abs(float(both) - 0.75**2) < 0.045  # choices of a token are dropped each for itself
    factor = 1 / 0.75 if rescale else 1.0
    assert_close(executed.weight_TK[stays], routing.weight_TK[stays] * factor, "layout")


def test_dropped_experts_are_dropped_for_a_sequence_or_for_the_whole_step() -> None:
    routing = routing_of()
    sequence = torch.arange(B * S) // S
    for per, groups in (("sequence", sequence), ("pass", torch.zeros_like(sequence))):
        stays = kept(ExpertDropoutConfig(rate=0.5, per=per).build()(routing, context(), "x"))
        cells = groups[:, None] * E + routing.expert_TK
        some = torch.zeros(B * E).index_add(0, cells.flatten(), stays.flatten().float())
        number = torch.bincount(cells.flatten(), minlength=B * E)
        assert bool(((some == 0) | (some == number)).all())
        assert bool((some == 0)[number > 0].any()) and bool((some > 0).any())


def test_zero_computation_experts_are_not_dropped() -> None:
    executed = ExpertDropoutConfig(rate=0.9).build()(routing_of(columns=E + 2), context(), "x")
    assert torch.equal(executed.dispatched[E:], executed.selected[E:]) and bool((executed.dispatched[:E] < executed.selected[:E]).all())


def test_gating_dropout_is_one_draw_for_all_tokens_of_a_layer_and_step() -> None:
    dropout, routing = GatingDropoutConfig(rate=0.3).build(), routing_of()
    off = []
    for step in range(400):
        stays = kept(dropout(routing, context(step=step), "x"))
        assert bool(stays.all()) or not bool(stays.any())
        off.append(not bool(stays.any()))
    assert abs(sum(off) / 400 - 0.3) < 0.09
    other = ForwardContext(batch_size=B, seq_len=S, training=True)
    decisions = {bool(kept(dropout(routing, other.at(f"layers.{i}"), "x")).any()) for i in range(20)}
    assert decisions == {True, False}


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.kind)
def test_nothing_is_dropped_in_evaluation(config: Any) -> None:
    routing = routing_of()
    assert config.build()(routing, context(training=False), "x") is routing


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.kind)
def test_draws_belong_to_the_sample_and_a_recomputed_pass_repeats_them(config: Any) -> None:
    routing, dropout = routing_of(), config.build()
    sample = torch.arange(100, 100 + B)
    ctx = context(sample=sample)
    whole = dropout(routing, ctx, "x")
    ctx.forward.recomputing = True
    assert torch.equal(dropout(routing, ctx, "x").expert, whole.expert)
    for row in (0, 7):
        alone = dropout(routing.narrow(row * S, S), context(1, sample=sample[row : row + 1]), "x")
        assert torch.equal(alone.expert_TK, whole.expert_TK[row * S : (row + 1) * S])


def test_losses_and_counts_before_dropping_do_not_change() -> None:
    logits = torch.randn(B * S, E, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    routing = routing_of(probs=logits.softmax(1))
    executed = ExpertDropoutConfig(rate=0.5).build()(routing, context(), "x")
    assert torch.equal(executed.selected, routing.selected) and int(executed.dispatched.sum()) == int(kept(executed).sum())
    assert routing.dispatched is routing.selected and bool((routing.expert != PAD).all())
    assert SwitchBalanceConfig().build()(routing, context()).item() > 0
