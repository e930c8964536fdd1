"""Any placement computes what one process computes: random copies at each step, every way of moving and keeping them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moetrain.moe.context import ForwardContext
from moetrain.moe.execution import LocalExecutor
from moetrain.moe.experts.ffn import FFNExpertsConfig
from moetrain.moe.routing import fixed_routing
from moetrain.ops.noise import hash_text
from moetrain.parallel.collectives import Peers
from moetrain.parallel.executor import Links, PlacedExecutor
from moetrain.parallel.layouts import FSSDPSettings, Layout
from moetrain.parallel.placement.dispatch import split_quota
from moetrain.parallel.placement.plan import Cluster, PlacementPlan
from moetrain.testing.distributed import run_distributed
from moetrain.testing.layouts import merge, train_steps
from moetrain.testing.scenarios import SCENARIOS, compare
from moetrain.testing.tolerances import assert_close


def random_plan(executor, name, step):
    """Every copy exists with probability 1/2; in some steps and layers there are none, in some all."""
    owner = executor.plan.owner
    rng = np.random.default_rng(hash_text(f"{name}/{step}"))
    holders = rng.random((owner.size, executor.plan.num_ranks)) < rng.choice([0.0, 0.5, 0.5, 1.0])
    holders[np.arange(owner.size), owner] = True
    plan = PlacementPlan(owner, holders)
    plan.validate()
    return plan


SETTINGS = {
    "quota": dict(),
    "even": dict(split="even"),
    "rematerialize": dict(rematerialize=True),
    "chunks": dict(),
    "chunks_rematerialize": dict(rematerialize=True),
    "two_stage": dict(transport="two_stage"),
    "striped": dict(transport="striped", rematerialize=True),
}
CASES = [
    ("deepseek", "quota", 2, 1), ("padded", "even", 4, 1), ("all_to_one", "quota", 4, 1), ("recompute", "rematerialize", 4, 1),
    ("fewer_experts_than_ranks", "rematerialize", 4, 1), ("recompute", "quota", 2, 1), ("accumulate", "rematerialize", 2, 1),
    ("glam_capacity", "even", 2, 1), ("ragged", "chunks", 4, 1), ("ragged_recompute", "chunks_rematerialize", 4, 1),
    ("zero_experts", "chunks", 2, 1), ("deepseek", "quota", 4, 2), ("aux_free", "two_stage", 4, 1), ("deepseek", "striped", 4, 1),
    ("accumulate", "chunks", 4, 1), ("deepseek", "quota", 8, 1), ("padded", "striped", 4, 2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "world_size", "replicate"), CASES, ids=lambda v: str(v))
def test_random_placements_change_nothing(name, settings, world_size, replicate):
    scenario = SCENARIOS[name]
    expected = train_steps(0, 1, scenario, "single")
    layout = Layout("fssdp", replicate, world_size // replicate, FSSDPSettings(**SETTINGS[settings]), 2, 3 if "chunks" in settings else 1)
    compare(merge(run_distributed(train_steps, world_size, scenario, layout, replicate, random_plan)), expected)


PAPER = {"planner": "sparse_materialization", "reshard_every": 1}
PLANNED = [
    ("deepseek", Layout("zero3_experts", 1, 2, FSSDPSettings(planner="everywhere", split="even", rematerialize=True))),
    ("padded", Layout("fssdp", 1, 4, FSSDPSettings(reshard_every=1), 2)),
    ("all_to_one", Layout("fssdp", 1, 4, FSSDPSettings(extra_slots=1, prediction="last"), 2)),
    ("accumulate", Layout("fssdp", 1, 2, FSSDPSettings(rematerialize=True, reshard_every=2, prediction="exponential"))),
    ("fewer_experts_than_ranks", Layout("fssdp_paper", 1, 4, FSSDPSettings(**PAPER, overlap_degree=2), 2)),
    ("recompute", Layout("fssdp_paper", 2, 2, FSSDPSettings(**PAPER, overlap_degree=3, split="even"))),
    ("aux_free", Layout("ep", 1, 4, degree=2)),
    ("accumulate", Layout("fssdp", 1, 4, FSSDPSettings(accumulate="step", extra_slots=3), 2)),
    ("padded", Layout("fssdp", 1, 4, FSSDPSettings(calibrate=True, extra_slots=3), 2)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "layout"), PLANNED, ids=lambda v: v if isinstance(v, str) else v.name)
def test_planners_and_resharding_change_nothing(name, layout):
    scenario = replace(SCENARIOS[name], steps=5)
    compare(merge(run_distributed(train_steps, layout.world_size, scenario, layout)), train_steps(0, 1, scenario, "single"))


def late_plan(executor, name, step):
    """Half of the random copies are known before the router has chosen, all of them afterwards."""
    plan = random_plan(executor, name, step)
    early = plan.holders & (np.indices(plan.holders.shape).sum(0) % 2 == 0)
    early[np.arange(plan.num_experts), plan.owner] = True
    executor.calibrate = lambda counts, planned: plan if (plan.holders & ~planned.holders).any() else planned
    return replace(plan, holders=early)


@pytest.mark.parametrize("settings", ["quota", "rematerialize", "chunks"])
@pytest.mark.parametrize("name", ["padded", "recompute", "accumulate"])
def test_copies_that_come_after_the_router_change_nothing(name, settings):
    layout = Layout("fssdp", 1, 4, FSSDPSettings(**SETTINGS[settings]), 2, 3 if settings == "chunks" else 1)
    actual = merge(run_distributed(train_steps, 4, SCENARIOS[name], layout, 1, late_plan))
    compare(actual, train_steps(0, 1, SCENARIOS[name], "single"))


@pytest.mark.parametrize(
    ("name", "ranks", "plans"),
    [("deepseek", 4, None), ("ragged_recompute", 4, random_plan), ("padded", 4, random_plan), ("all_to_one", 6, random_plan),
     ("zero_experts", 2, None), ("fewer_experts_than_ranks", 8, random_plan)],
)  # fmt: skip
def test_a_token_that_crosses_to_a_node_once_arrives_like_any_other(name, ranks, plans):
    scenario = replace(SCENARIOS[name], batch_size=24)
    layout = Layout("fssdp", 1, ranks, FSSDPSettings(rematerialize=True), ranks_per_node=2, deduplicate=True)
    compare(merge(run_distributed(train_steps, ranks, scenario, layout, 1, plans)), train_steps(0, 1, scenario, "single"))


def execute(rank, world_size, plan, remap):
    """Output and input gradient on this rank, and what one process computes for the same rows."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(9, 6, generator=generator, dtype=torch.float64).requires_grad_()
    ids = torch.randint(len(remap), (9, 2), generator=generator)
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
    for run, index, module in ((executor, ids, owned), (LocalExecutor(), torch.tensor(remap)[ids], full)):
        y = run(x, fixed_routing(index, weight, num_experts=len(remap) if run is executor else 4), module, ctx)
        results.append((y.detach(), torch.autograd.grad(y.square().sum(), x)[0]))
    return results


@pytest.mark.parametrize("copies", [False, True])
def test_several_ids_of_the_router_may_share_an_expert(copies):
    remap = [0, 0, 3, 1, 2, 1]
    owner = np.array([0, 1, 1, 0])
    holders = np.ones((4, 2), dtype=bool) if copies else owner[:, None] == np.arange(2)
    plan = PlacementPlan(owner, holders, np.array(remap))
    for actual, expected in run_distributed(execute, 2, plan, remap):
        for ours, theirs in zip(actual, expected, strict=True):
            assert_close(ours, theirs, kind="layout")
