"""Routing: coordinate form, fixed view, padding, slots of ragged choices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moetrain.moe.routing import PAD, count_experts, fixed_routing, ragged_routing


def test_counting_leaves_padding_out_and_keeps_unused_experts() -> None:
    assert count_experts(torch.tensor([2, PAD, 0, 2]), 4).tolist() == [1, 0, 2, 0]
    assert count_experts(torch.empty(0, dtype=torch.int64), 3).tolist() == [0, 0, 0]


def test_a_fixed_routing_is_its_table_row_by_row() -> None:
    expert = torch.tensor([[1, 0], [2, 1], [0, 2]])
    weight = torch.rand(3, 2, requires_grad=True)
    routing = fixed_routing(expert, weight, num_experts=4)
    assert routing.token.tolist() == [0, 0, 1, 1, 2, 2] and routing.slot.tolist() == [0, 1] * 3
    assert torch.equal(routing.expert_TK, expert) and torch.equal(routing.weight_TK, weight)
    assert routing.selected.tolist() == [2, 2, 2, 0] == routing.dispatched.tolist()
    assert not routing.padded and routing.weight.requires_grad


def test_choices_of_padding_tokens_are_not_there() -> None:
    routing = fixed_routing(torch.tensor([[1], [0], [1]]), torch.ones(3, 1), num_experts=2, valid=torch.tensor([True, True, False]))
    assert routing.expert.tolist() == [1, 0, PAD] and routing.weight.tolist() == [1, 1, 0]
    assert routing.selected.tolist() == [1, 1] and routing.padded


def test_zero_computation_experts_are_counted_in_their_own_columns() -> None:
    routing = fixed_routing(torch.tensor([[0, 3]]), torch.ones(1, 2), num_experts=2, num_columns=4)
    assert routing.selected.tolist() == [1, 0, 0, 1] and routing.num_experts == 2


def test_dropping_changes_what_is_dispatched_and_not_what_was_selected() -> None:
    routing = fixed_routing(torch.tensor([[0, 1], [0, 1]]), torch.rand(2, 2, requires_grad=True), num_experts=2)
    kept = torch.tensor([True, True, False, True])
    executed = routing.keep(kept)
    assert executed.expert.tolist() == [0, 1, PAD, 1] and executed.padded and executed.top_k == 2
    assert executed.selected.tolist() == [2, 2] and executed.dispatched.tolist() == [1, 2]
    assert torch.equal(executed.weight, torch.where(kept, routing.weight, 0.0))
    (gradient,) = torch.autograd.grad(executed.weight.sum(), routing.weight)
    assert gradient.tolist() == [1, 1, 0, 1]
    replaced = routing.keep(kept, torch.full((4,), 7.0))
    assert replaced.weight.tolist() == [7, 7, 0, 7]


def test_ragged_slots_follow_falling_weight_with_the_lower_expert_first_on_ties() -> None:
    selected = torch.tensor([[True, False, True, True], [False, False, False, False], [True, True, False, True]])
    weight = torch.tensor([[0.2, 0.9, 0.5, 0.3], [0.1, 0.1, 0.1, 0.1], [0.4, 0.4, 1.0, 0.4]], requires_grad=True)
    routing = ragged_routing(selected, weight, num_experts=4)
    assert routing.token.tolist() == [0, 0, 0, 2, 2, 2] and routing.expert.tolist() == [0, 2, 3, 0, 1, 3]
    assert routing.slot.tolist() == [2, 0, 1, 0, 1, 2]
    assert routing.selected.tolist() == [2, 1, 1, 2] and routing.top_k is None and routing.weight.requires_grad
    with pytest.raises(AssertionError, match="ragged"):
        _ = routing.expert_TK


def test_ragged_routing_leaves_padding_tokens_out() -> None:
    selected = torch.ones(3, 2, dtype=torch.bool)
    routing = ragged_routing(selected, torch.ones(3, 2), num_experts=2, valid=torch.tensor([True, False, True]))
    assert routing.token.tolist() == [0, 0, 2, 2] and routing.selected.tolist() == [2, 2]


@pytest.mark.parametrize("form", ["fixed", "ragged", "shuffled"])
def test_the_parts_of_a_routing_are_the_routing(form: str) -> None:
    """Runs of tokens, numbered from zero, with their own counts; unsorted entries too."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(6, 4, generator=generator)
    if form == "fixed":
        routing = fixed_routing(weight.topk(2, dim=1).indices, weight[:, :2], num_experts=4, logits=weight, probs=weight)
    else:
        routing = ragged_routing(weight > 0.4, weight, num_experts=4, logits=weight, probs=weight)
    if form == "shuffled":
        order = torch.randperm(routing.token.numel(), generator=generator)
        routing = replace(routing, **{name: getattr(routing, name)[order] for name in ("token", "expert", "slot", "weight")})
    entries = lambda r, first=0: sorted(zip((r.token + first).tolist(), r.expert.tolist(), r.slot.tolist(), r.weight.tolist(), strict=True))  # noqa: E731
    parts = [routing.narrow(first, 2) for first in (0, 2, 4)]
    assert sum((entries(part, first) for part, first in zip(parts, (0, 2, 4), strict=True)), []) == entries(routing)
    assert torch.equal(sum(part.dispatched for part in parts), routing.dispatched)
    assert all(part.num_tokens == 2 and part.top_k == routing.top_k and torch.equal(part.selected, routing.selected) for part in parts)
    assert torch.equal(torch.cat([part.probs for part in parts]), weight)  # type: ignore[misc]
