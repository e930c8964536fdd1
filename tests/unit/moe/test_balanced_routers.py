"""Routers that balance by construction: BASE and Sinkhorn assignment, expert choice."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetrain.config import load
from moetrain.errors import ConfigError
from moetrain.moe.context import ForwardContext, RouterContext
from moetrain.moe.layer import MoEParts
from moetrain.moe.routers.assignment import BaseConfig, SinkhornConfig, balanced_assignment, sinkhorn
from moetrain.moe.routers.expert_choice import ExpertChoiceConfig
from moetrain.registry import lookup
from moetrain.testing import assert_close
from moetrain.testing.scenarios import deepseek

D, E, B, S = 6, 4, 3, 8


def context(batch: int = B, seq: int = S, **kwargs: Any) -> RouterContext:
    return ForwardContext(**{"batch_size": batch, "seq_len": seq, "training": True, **kwargs}).at("layers.0")


def random_logits(tokens: int = B * S, experts: int = E, seed: int = 0) -> Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(config: Any) -> Any:
    router = config.build(D, E, dtype=torch.float64)
    for parameter in router.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return router


def everything(groups: int, size: int) -> Tensor:
    return torch.ones(groups, size, dtype=torch.bool)


@pytest.mark.parametrize("seed", range(5))
def test_an_auction_finds_the_best_assignment(seed: int) -> None:
    """Against all permutations: one token per expert."""
    scores, rows = random_logits(6, 6, seed), torch.arange(6)
    found = balanced_assignment(scores[None], everything(1, 6), 1e-3)[0]
    best = max(scores[rows, torch.tensor(order)].sum().item() for order in permutations(range(6)))
    assert sorted(found.tolist()) == list(range(6))
    assert scores[rows, found].sum().item() > best - 6 * 1e-3 * (scores.max() - scores.min()).item()


def test_assignments_are_even_and_groups_do_not_see_each_other() -> None:
    scores = random_logits(2 * 30).view(2, 30, E) + torch.tensor([5.0, 0, 0, 0], dtype=torch.float64)
    valid = everything(2, 30)
    valid[1, 20:] = False
    found = balanced_assignment(scores, valid, 0.01)
    assert torch.bincount(found[0], minlength=E).max() == 8  # ceil(30 / 4)
    assert torch.bincount(found[1, :20], minlength=E).tolist() == [5] * E
    assert torch.equal(found[1, :20], balanced_assignment(scores[1:, :20], everything(1, 20), 0.01)[0])


def test_assignment_of_awkward_scores() -> None:
    equal = balanced_assignment(torch.zeros(1, 8, E), everything(1, 8), 0.01)
    assert torch.bincount(equal[0], minlength=E).tolist() == [2] * E
    broken = random_logits(8).view(1, 8, E)
    broken[0, 0], broken[0, 1, 1] = torch.nan, -torch.inf
    assert torch.bincount(balanced_assignment(broken, everything(1, 8), 0.01)[0], minlength=E).tolist() == [2] * E
    assert balanced_assignment(torch.zeros(2, 3, 1), everything(2, 3), 0.01).tolist() == [[0] * 3] * 2


def test_sinkhorn_rows_and_columns_are_even() -> None:
    logits = 2 * random_logits().view(B, S, E)
    valid = everything(B, S)
    valid[0, 5:], valid[2] = False, False
    scaled = sinkhorn(logits, valid, 1e-10)
    tokens = valid.sum(1)[:, None]
    # to within the small number in the divisors
    assert (scaled.sum(2)[:2] - torch.where(valid[:2], 1 / tokens[:2], 0.0)).abs().max() < 1e-6
    assert (scaled[:2].sum(1) - 1 / E).abs().max() < 1e-6
    assert bool((scaled[2] == 0).all())
    for group in range(2):
        assert_close(sinkhorn(logits[group : group + 1], valid[group : group + 1], 1e-4)[0], sinkhorn(logits, valid, 1e-4)[group], "exact")


@pytest.mark.parametrize("config", [BaseConfig(), SinkhornConfig(top_k=1, score="sigmoid")], ids=lambda c: c.kind)
def test_balanced_in_training_and_greedy_in_evaluation(config: Any) -> None:
    router, x = make(config), torch.randn(B * S, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1
    trained, evaluated = (router(x, context(training=t)) for t in (True, False))
    assert torch.equal(evaluated.expert, evaluated.logits.argmax(1))
    assert trained.selected.max() < evaluated.selected.max()
    assert_close(trained.weight, torch.sigmoid(trained.logits.gather(1, trained.expert_TK)).flatten(), "exact")
    if config.kind == "base":
        assert trained.selected.tolist() == [B * S // E] * E
    trained.weight.sum().backward()
    assert bool(router.weight.grad.isfinite().all()) and bool((router.weight.grad != 0).any())


def test_the_papers_interpolation_is_this_weight_in_a_residual_block() -> None:
    """BASE: a f(x) + (1 - a) x with f(x) = x + g(x) is x + a g(x)."""
    x, g, a = (random_logits(10, 3, seed) for seed in range(3))
    assert_close(a * (x + g) + (1 - a) * x, x + a * g, "layout")


@pytest.mark.parametrize("factor", [0.1, 1.0, 2.0, 100.0])
def test_every_expert_takes_the_same_number_of_tokens(factor: float) -> None:
    router = ExpertChoiceConfig(factor=factor).build(D, E, dtype=torch.float64)
    routing = router.route(random_logits(), context())
    places = min(S, max(1, int(factor * S / E)))
    per_group = torch.bincount(routing.token // S * E + routing.expert, minlength=B * E)
    assert per_group.tolist() == [places] * (B * E)
    column = routing.probs.view(B, S, E)
    taken = torch.zeros(B * S, E, dtype=torch.bool).index_put((routing.token, routing.expert), torch.tensor(True)).view(B, S, E)
    assert bool((column.where(taken, torch.inf).amin(1) >= column.where(~taken, -torch.inf).amax(1)).all())
    assert_close(routing.weight, routing.probs[routing.token, routing.expert], "exact")


def test_experts_choose_no_padding() -> None:
    valid = torch.arange(B * S) % S < torch.tensor([8, 2, 0]).repeat_interleave(S)
    routing = ExpertChoiceConfig().build(D, E, dtype=torch.float64).route(random_logits(), context(valid=valid))
    assert bool(valid[routing.token].all()) and routing.selected.tolist() == [4 + 2] * E


def test_a_later_token_changes_what_an_earlier_one_gets_and_a_decoder_refuses_that() -> None:
    router = ExpertChoiceConfig().build(D, E, dtype=torch.float64)
    logits, changed = random_logits(), random_logits()
    logits[S - 1, 1], changed[S - 1, 1] = -10, 10
    before, after = (router.route(z, context(training=False)) for z in (logits, changed))
    earlier = [set(zip(*(t[r.token < S - 1].tolist() for t in (r.token, r.expert)), strict=True)) for r in (before, after)]
    assert earlier[0] != earlier[1]

    def build(allow: bool) -> Any:
        made = deepseek()
        parts = MoEParts(router=ExpertChoiceConfig(allow_future=allow), experts=made.parts.experts, capacity=made.parts.capacity)
        return made.model.build(parts, vocab_size=20, dtype=torch.float64)

    with pytest.raises(ConfigError, match="allow_future=true"):
        build(False)
    assert build(True).moe_layers()


def test_settings_that_do_not_fit_are_named() -> None:
    for name in ("base", "sinkhorn"):
        with pytest.raises(ConfigError, match="chooses by balance"):
            load(lookup("router", name), {"top_k": 1, "selection_bias": True})
    with pytest.raises(ConfigError, match="top_k"):
        load(BaseConfig, {"top_k": 2})
