"""SparseMixer: the band, the rounds, what is drawn, and whose gradient the weight has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.moe.context import ForwardContext
from moetrain.moe.routers.sparsemixer import SparseMixerConfig
from moetrain.moe.routing import Routing
from moetrain.testing import assert_close

E, T = 6, 4000


def route(logits: Tensor, top_k: int = 1, band: float = 0.01, training: bool = True) -> Routing:
    router = SparseMixerConfig(top_k=top_k, band=band).build(1, E, dtype=torch.float64)
    ctx: Any = ForwardContext(batch_size=1, seq_len=len(logits), training=training).at("layers.0")
    return router.route(logits, ctx)


def one_row() -> Tensor:
    return torch.tensor([1.0, 0.9, 0.8, 0.5, 0.2, -1.0], dtype=torch.float64)


def test_rounds_choose_different_experts_best_first_in_evaluation() -> None:
    logits = torch.randn(50, E, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    routing = route(logits, top_k=3, training=False)
    assert torch.equal(routing.expert_TK, logits.topk(3, dim=1).indices)
    assert all(len(set(row)) == E for row in route(logits, top_k=E).expert_TK.tolist())


def test_draws_follow_the_softmax_over_the_band() -> None:
    band = 0.11  # (1 - z) / 1 > 0.22 leaves 1.0, 0.9 and 0.8
    routing = route(one_row().expand(T, E), band=band)
    expected = torch.softmax(one_row()[:3], 0)
    drawn = routing.selected.double() / T
    assert (drawn[:3] - expected).abs().max() < 0.04 and drawn[3:].sum() == 0  # five deviations


def test_an_other_expert_than_the_best_enters_at_a_third_in_three_of_four_draws() -> None:
    routing = route(one_row().expand(T, E), band=0.11)
    probs = torch.softmax(one_row()[:3], 0)[routing.expert]
    third = (routing.weight / probs < 0.5).double()
    assert_close(routing.weight, torch.where(third > 0, probs / 3, probs), "layout")
    others = routing.expert != 0
    assert third[~others].sum() == 0 and abs(third[others].mean() - 0.75) < 0.05


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_gradient_is_that_of_the_softmax_over_the_band(top_k: int) -> None:
    logits = one_row().repeat(50, 1).requires_grad_()
    routing = route(logits, top_k=top_k, band=0.11)
    cotangent = torch.linspace(-1, 1, routing.weight.numel(), dtype=torch.float64).view(-1, top_k)
    (gradient,) = torch.autograd.grad((routing.weight_TK * cotangent).sum(), logits)
    expected = torch.zeros_like(gradient)
    for row, experts in enumerate(routing.expert_TK.tolist()):
        left = one_row()
        for turn, expert in enumerate(experts):
            outside = (left.max() - one_row()) / one_row().abs().clamp_min(left.max()) > 0.22
            p = torch.softmax(left.masked_fill(outside, -torch.inf), 0)
            expected[row] += cotangent[row, turn] * p[expert] * (torch.eye(E, dtype=torch.float64)[expert] - p)
            left = left.index_fill(0, torch.tensor(expert), -torch.inf)
    assert_close(gradient, expected, "layout")
