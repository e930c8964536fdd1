"""Tree gates and binary codes: simplex, sparsity, permutations, what is learned when."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetrain.moe.context import ForwardContext, RouterContext
from moetrain.moe.losses.selectors import PermutationEntropyConfig, SelectorEntropyConfig, TrappedExpertsConfig
from moetrain.moe.losses.z import ZLossConfig
from moetrain.moe.routers.base import Router
from moetrain.moe.routers.comet import CometRouter, CometRouterConfig, leaf_probabilities
from moetrain.moe.routers.dselect import DSelectRouterConfig
from moetrain.ops.assignment import best_permutation, sinkhorn
from moetrain.ops.smooth_step import smooth_step
from moetrain.parallel.parallelize import find_init
from moetrain.testing import assert_close
from moetrain.testing.scenarios import SCENARIOS

T, D, K = 40, 5, 2
EXPERTS = [2, 3, 4, 6, 8]


def fill(router: Router) -> None:
    for parameter in router.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))


def comet(experts: int = 8, **settings: Any) -> CometRouter:
    router = CometRouterConfig(**{"num_trees": K, **settings}).build(D, experts, dtype=torch.float64)
    fill(router)
    return router


def dselect(experts: int = 8, **settings: Any) -> Router:
    router = DSelectRouterConfig(**{"num_selectors": K, **settings}).build(D, experts, dtype=torch.float64)
    fill(router)
    return router


def context(**kwargs: Any) -> RouterContext:
    return ForwardContext(**{"batch_size": 1, "seq_len": T, "training": True, **kwargs}).at("layers.0")


def inputs() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def gates(router: Router, x: Tensor, **kwargs: Any) -> Tensor:
    routing = router(x, context(**kwargs))
    dense = torch.zeros(x.shape[0], router.num_experts, dtype=torch.float64)
    return dense.index_put((routing.token, routing.expert), routing.weight)


@pytest.mark.parametrize("width", [1.0, 0.1, 0.3])
def test_smooth_step_reaches_zero_and_one(width: float) -> None:
    t = torch.linspace(-width, width, 41, dtype=torch.float64).requires_grad_()
    s = smooth_step(t, width)
    assert bool((s[t <= -width / 2] == 0).all() and (s[t >= width / 2] == 1).all() and (s.diff() >= 0).all())
    s.sum().backward()
    assert_close(s[20], torch.tensor(0.5, dtype=torch.float64), "layout")
    near = t.detach().abs() >= width / 2 - 1e-12
    assert float(t.grad[near].abs().max()) < 1e-9 and float(t.grad.max()) == pytest.approx(1.5 / width)  # type: ignore[index,union-attr]


@pytest.mark.parametrize("experts", EXPERTS)
def test_leaves_of_a_tree_sum_to_one(experts: int) -> None:
    left = torch.rand(T, K, experts - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    leaves = leaf_probabilities(left)
    assert_close(leaves.sum(2), torch.ones(T, K, dtype=torch.float64), "layout")
    assert_close(leaf_probabilities(torch.ones_like(left)).argmax(2).unique().numel() * 1.0, 1.0, "exact")
    small = left[:2].detach().requires_grad_()
    assert torch.autograd.gradcheck(leaf_probabilities, (small,))


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("make", [comet, dselect])
def test_gates_are_a_simplex_and_at_most_k_when_decided(make: Any, experts: int) -> None:
    soft, hard = (gates(make(experts, width=width), inputs()) for width in (5.0, 1e-9))
    power = make is comet or experts & (experts - 1) == 0  # else a code may mean no expert
    for weights in (soft, hard):
        assert bool((weights >= 0).all()) and float(weights.detach().sum(1).max()) < 1 + 1e-6
        if power:
            assert_close(weights.sum(1), torch.ones(T, dtype=torch.float64), "layout")
    assert int((hard > 0).sum(1).max()) <= K
    assert int((soft > 0).sum(1).max()) > K or experts == 2


def test_one_decided_tree_is_one_hot_whatever_its_leaves_score() -> None:
    router = comet(num_trees=1, width=1e-9)
    before = gates(router, inputs())
    nn.init.normal_(router.leaf_weight, 0, 10)
    assert bool((before.sum(1) == 1).all() and (before.amax(1) == 1).all())
    assert torch.equal(before, gates(router, inputs()))


def test_entropy_is_zero_when_decided_and_largest_when_even() -> None:
    for make, experts in ((comet, 8), (dselect, 8)):
        even, decided = make(experts, width=1e9), make(experts, width=1e-9)
        values = [float(SelectorEntropyConfig().build()(r(inputs(), context()), context()).detach()) for r in (even, decided)]
        assert values[0] == pytest.approx(K * math.log(experts), abs=1e-4) and abs(values[1]) < 1e-4
    shifted = comet(width=1e-9, shifted_entropy=True)(inputs(), context()).aux["selector_entropy"]
    assert float(shifted.detach().min()) > 1e-4


def test_trapped_experts_cost_and_stay_finite() -> None:
    loss = TrappedExpertsConfig().build()
    assert_close(loss(dselect(8)(inputs(), context()), context()), torch.tensor(float(K), dtype=torch.float64), "layout")
    router = dselect(5, num_selectors=1, static=True, width=1.0)
    with torch.no_grad():
        router.code_bias.fill_(1.0)  # type: ignore[union-attr,operator]  every bit is one: the eighth of five
    routing = router(inputs(), context())
    assert routing.expert.numel() == 0 and bool(loss(routing, context()).isfinite()) and float(loss(routing, context()).detach()) > 1e3


def test_a_static_gate_is_the_same_for_all_tokens() -> None:
    weights = gates(dselect(static=True, width=9.0), inputs())
    assert bool((weights == weights[:1]).all()) and int((weights[0] > 0).sum()) > 1


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_assignment_is_the_best_of_all_permutations(size: int) -> None:
    for seed in range(20):
        scores = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        if seed % 4 == 0:
            scores = scores.round()  # ties
        rows = torch.arange(size)
        found = best_permutation(scores)
        assert sorted(found.tolist()) == rows.tolist()
        best = max(float(scores[rows, torch.tensor(p)].sum()) for p in itertools.permutations(range(size)))
        assert float(scores[rows, found].sum()) == pytest.approx(best)


def test_sinkhorn_is_doubly_stochastic() -> None:
    scores = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices = sinkhorn(scores, 200)
    for dim in (1, 2):
        assert_close(matrices.sum(dim), torch.ones(3, 6, dtype=torch.float64), "layout")
    assert_close(sinkhorn(scores, 1).sum(1), torch.ones(3, 6, dtype=torch.float64), "layout")


def test_permutations_relabel_experts() -> None:
    plain, router = comet(num_trees=1), comet(num_trees=1, permutation_steps=5)
    router.load_state_dict(plain.state_dict(), strict=False)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    assert router.permutation is not None
    router.permutation.progress.fill_(1.0)
    router.permutation.fixed.copy_(order[None] + 1)
    assert_close(gates(router, inputs())[:, order], gates(plain, inputs()), "layout")


def test_permutations_are_soft_while_learned_hard_in_evaluation_and_fixed_afterwards() -> None:
    router, ctx, loss = comet(permutation_steps=10), context(), PermutationEntropyConfig().build()
    search = router.permutation
    assert search is not None
    with torch.no_grad():
        search.scores.mul_(0.002)
    router.begin_step(0, 100)
    soft = search(ctx)
    assert_close(soft.sum(1), torch.ones(K, 8, dtype=torch.float64), "layout")
    value = loss(router(inputs(), ctx), ctx)
    value.backward()
    assert 0 < float(value.detach()) <= 2 * 8 * math.log(8) and bool((search.scores.grad != 0).any())  # type: ignore[union-attr]
    hard = search(context(training=False))
    assert bool(((hard == 0) | (hard == 1)).all() and (hard.sum(1) == 1).all() and (search.fixed == 0).all())
    router.begin_step(10, 100)
    fixed = search(ctx)
    assert not fixed.requires_grad and bool((search.fixed > 0).all())
    with torch.no_grad():
        search.scores.neg_()  # what an optimizer's momentum may still do
    assert torch.equal(search(ctx), fixed) and float(loss(router(inputs(), ctx), ctx).detach()) < 1e-4


def test_losses_name_the_routers_that_fit() -> None:
    def fits(loss: Any, router: Any) -> bool:
        return not list(loss.check("loss.x", num_experts=8, router=router))

    tree, codes = CometRouterConfig(num_trees=1), DSelectRouterConfig(num_selectors=1)
    assert fits(SelectorEntropyConfig(), tree) and fits(SelectorEntropyConfig(), codes)
    assert fits(TrappedExpertsConfig(), codes) and not fits(TrappedExpertsConfig(), tree)
    assert fits(PermutationEntropyConfig(), CometRouterConfig(num_trees=1, permutation_steps=3)) and not fits(
        PermutationEntropyConfig(), tree
    )
    assert not fits(ZLossConfig(), tree) and fits(ZLossConfig(), SCENARIOS["deepseek"].parts.router)
    assert not list(codes.check("router", num_experts=2)) and list(codes.check("router", num_experts=1))


def test_a_model_starts_splits_soft() -> None:
    scenario = SCENARIOS["comet"]
    with torch.device("meta"):
        model = scenario.model.build(scenario.parts, vocab_size=scenario.vocab_size, dtype=torch.float64)
    router = f"{next(iter(model.moe_layers()))}.router"
    start = find_init(model, f"{router}.split_weight")
    values = torch.empty(1000)
    start(values, torch.Generator().manual_seed(0))
    bound = scenario.parts.router.width / 100
    assert 0.9 * bound < float(values.abs().max()) <= bound
    assert find_init(model, f"{router}.permutation.scores") != find_init(model, f"{router}.leaf_bias")
