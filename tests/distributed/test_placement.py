"""Copies in unusual places and at unusual times change nothing. Random and planned copies: ``moetrain.testing.table``."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moetrain.moe.context import ForwardContext
from moetrain.moe.execution import LocalExecutor
from moetrain.moe.experts.ffn import FFNExpertsConfig
from moetrain.moe.routing import fixed_routing
from moetrain.parallel.collectives import Peers, traffic
from moetrain.parallel.executor import Links, PlacedExecutor
from moetrain.parallel.layouts import FSSDPSettings, Layout
from moetrain.parallel.placement.dispatch import split_quota
from moetrain.parallel.placement.plan import Cluster, PlacementPlan
from moetrain.testing.distributed import run_distributed
from moetrain.testing.layouts import merge, train_steps
from moetrain.testing.scenarios import SCENARIOS, compare
from moetrain.testing.table import random_plan
from moetrain.testing.tolerances import assert_close


def all_to_the_first(executor, name, step):
    """Copies of rank 0's experts in the other node only, so that most ranks hold none."""
    owner = executor.plan.owner
    holders = owner[:, None] == np.arange(executor.plan.num_ranks)
    holders[owner == 0, -1] = True
    return PlacementPlan(owner, holders)


@pytest.mark.parametrize("transport", ["direct", "two_stage", "striped"])
@pytest.mark.parametrize("name", ["all_to_one", "recompute"])
def test_ranks_without_copies_pass_those_of_others_on_in_the_backward_too(name, transport):
    layout = Layout("fssdp", 1, 4, FSSDPSettings(rematerialize=True, transport=transport), ranks_per_node=2)
    actual = merge(run_distributed(train_steps, 4, SCENARIOS[name], layout, 1, all_to_the_first))
    compare(actual, train_steps(0, 1, SCENARIOS[name], "single"))


def late_plan(executor, name, step):
    """Half of the random copies are known before the router has chosen, all of them afterwards."""
    plan = random_plan(executor, name, step)
    early = plan.holders & (np.indices(plan.holders.shape).sum(0) % 2 == 0)
    early[np.arange(plan.num_experts), plan.owner] = True
    executor.calibrate = lambda counts, planned: plan if (plan.holders & ~planned.holders).any() else planned
    return replace(plan, holders=early)


@pytest.mark.parametrize(("settings", "degree"), [({}, 1), ({"rematerialize": True}, 1), ({}, 3)], ids=["kept", "rematerialize", "chunks"])
@pytest.mark.parametrize("name", ["padded", "recompute", "accumulate"])
def test_copies_that_come_after_the_router_change_nothing(name, settings, degree):
    layout = Layout("fssdp", 1, 4, FSSDPSettings(**settings), 2, degree)
    actual = merge(run_distributed(train_steps, 4, SCENARIOS[name], layout, 1, late_plan))
    compare(actual, train_steps(0, 1, SCENARIOS[name], "single"))


def execute(rank, world_size, plan, remap, zero=0):
    """Output and input gradient on this rank, and what one process computes for the same rows. Then the bytes of tokens that
    have left this rank, and its entries for experts of others. zero: ids behind the experts', which no expert has."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(9, 6, generator=generator, dtype=torch.float64).requires_grad_()
    columns = len(remap) + zero
    ids = torch.randint(columns, (9, 2), generator=generator)
    experts = [FFNExpertsConfig(num_experts=4, width=5).build(6, dtype=torch.float64) for _ in range(2)]
    full, owned = experts
    for parameter in full.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(9))
    owned.hold(plan.owned(rank).tolist())
    for mine, source in zip(owned.parameters(), full.parameters(), strict=True):
        mine.data.copy_(source[plan.owned(rank)])
    ctx = ForwardContext(batch_size=1, seq_len=9).at("layer")
    cluster = Cluster((0,) * world_size)
    links = Links(*(Peers(dist.group.WORLD, cluster.node_of) for _ in range(3)), cluster)
    executor = PlacedExecutor(plan.owner, links, x.device, dtype=x.dtype, split=split_quota)
    executor.plan = plan
    weight = torch.full((9, 2), 0.5, dtype=torch.float64)
    results = []
    traffic.clear()
    physical = torch.tensor([*remap, *range(4, 4 + zero)])
    for run, index, module in ((executor, ids, owned), (LocalExecutor(), physical[ids], full)):
        experts = len(remap) if run is executor else 4
        y = run(x, fixed_routing(index, weight, num_experts=experts, num_columns=experts + zero), module, ctx)
        results.append((y.detach(), torch.autograd.grad(y.square().sum(), x)[0]))
    elsewhere = np.append(plan.owner != rank, [False] * zero)[physical[ids].numpy()].sum()
    return *results, sum(traffic.bytes.values()), int(elsewhere)


@pytest.mark.parametrize("copies", [False, True])
def test_several_ids_of_the_router_may_share_an_expert(copies):
    remap = [0, 0, 3, 1, 2, 1]
    owner = np.array([0, 1, 1, 0])
    holders = np.ones((4, 2), dtype=bool) if copies else owner[:, None] == np.arange(2)
    plan = PlacementPlan(owner, holders, np.array(remap))
    for actual, expected, *_ in run_distributed(execute, 2, plan, remap):
        for ours, theirs in zip(actual, expected, strict=True):
            assert_close(ours, theirs, kind="layout")


@pytest.mark.parametrize("zero", [0, 4, 40])
def test_entries_for_zero_computation_experts_do_not_travel(zero):
    """Others do, there and back, with their gradients: four times a row of six numbers."""
    owner = np.array([0, 1, 1, 0])
    plan = PlacementPlan(owner, owner[:, None] == np.arange(2))
    results = run_distributed(execute, 2, plan, [0, 1, 2, 3], zero)
    for actual, expected, *_ in results:
        for ours, theirs in zip(actual, expected, strict=True):
            assert_close(ours, theirs, kind="layout")
    sent, elsewhere = (sum(result[i] for result in results) for i in (2, 3))
    assert sent == 4 * 6 * 8 * elsewhere
