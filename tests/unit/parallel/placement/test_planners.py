"""Algorithms 1 and 2 of Hecate, their limits, and calibration."""

import numpy as np
import pytest

from moetrain.parallel.placement.cost import LayerCost, layer_time
from moetrain.parallel.placement.dispatch import split_even
from moetrain.parallel.placement.plan import Cluster
from moetrain.parallel.placement.planners import (
    calibrate,
    even_sharding,
    everywhere,
    heterogeneous_sharding,
    owners_only,
    sparse_materialization,
)

COST = LayerCost(token_bytes=1000, expert_bytes=1_000_000, gradient_bytes=1_000_000, flops_per_token=1e6)


def node_imports(plan, cluster):
    """[N] distinct experts of other nodes in each node."""
    held = cluster.membership @ plan.holders.T > 0
    return (held & (cluster.node[plan.owner] != np.arange(cluster.num_nodes)[:, None])).sum(axis=1)


@pytest.mark.parametrize(("experts", "ranks"), [(16, 8), (7, 3), (9, 6), (2, 5), (1, 4), (64, 1)])
def test_even_sharding_gives_neighbours_and_equal_shares(experts, ranks):
    owner = even_sharding(experts, ranks)
    assert (np.diff(owner) >= 0).all() and np.ptp(np.bincount(owner, minlength=ranks)) <= 1


def test_fewer_experts_than_ranks_spread_over_the_nodes():
    assert Cluster.even(2, 4).node[even_sharding(2, 8)].tolist() == [0, 1]


def test_the_two_ends(cluster):
    owner = even_sharding(5, cluster.num_ranks)
    assert not owners_only(owner, cluster.num_ranks).copies.any()
    assert everywhere(owner, cluster.num_ranks).holders.all()


@pytest.mark.parametrize("rule", ["proportional", "greedy"])
@pytest.mark.parametrize(("overlap_degree", "extra_slots"), [(0, 3), (3, 0), (2, 2), (4, 1), (9, 3), (99, 99)])
def test_materialization_keeps_its_limits(rule, overlap_degree, extra_slots, cluster, skewed_counts):
    for experts in (1, 12):
        loads = skewed_counts(cluster.num_ranks, experts).sum(axis=0)
        owner = even_sharding(experts, cluster.num_ranks)
        plan = sparse_materialization(loads, owner, cluster, overlap_degree, extra_slots, rule)
        plan.validate(extra_slots)
        copied = np.flatnonzero(plan.copies.any(axis=1))
        assert len(copied) <= overlap_degree and (node_imports(plan, cluster) <= overlap_degree).all()
        assert set(copied) <= set(np.argsort(-loads, kind="stable")[:overlap_degree])


def test_materialization_prefers_nodes_without_a_copy():
    plan = sparse_materialization(np.array([100, 1, 1, 1]), np.array([0, 1, 2, 3]), Cluster.even(2, 2), 2, 1)
    assert plan.holders[0, 2:].any()


def test_greedy_slots_go_to_the_most_tokens_per_holder():
    # 90 / 1, then 45 = 45 / 2 (the lower id first), then 40 / 1
    plan = sparse_materialization(np.array([90, 45, 40, 0]), np.array([0, 1, 2, 2]), Cluster.even(1, 3), 4, 1, "greedy")
    assert plan.copies.sum(axis=1).tolist() == [2, 1, 0, 0]


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule 'fair'"):
        sparse_materialization(np.array([3, 2, 1]), np.array([0, 1, 1]), Cluster.even(1, 2), 3, 1, "fair")


@pytest.mark.parametrize("overlap_degree", [0, 2, 99])
@pytest.mark.parametrize(("layers", "experts"), [(1, 3), (4, 7), (3, 16)])
def test_sharding_gives_every_rank_equally_many_experts(layers, experts, overlap_degree, cluster, skewed_counts):
    loads = np.stack([skewed_counts(cluster.num_ranks, experts).sum(axis=0) for _ in range(layers)])
    for current in (None, np.tile(even_sharding(experts, cluster.num_ranks), (layers, 1))):
        owners = heterogeneous_sharding(loads, cluster, overlap_degree, current)
        held = np.bincount(owners.ravel(), minlength=cluster.num_ranks)
        assert owners.shape == loads.shape and owners.min() >= 0 and np.ptp(held) <= 1


def test_sharding_balances_what_is_not_copied(skewed_counts):
    cluster = Cluster.even(2, 4)
    loads = np.stack([skewed_counts(8, 32).sum(axis=0) for _ in range(6)])
    spread = {}
    for name, owners in (("even", np.tile(even_sharding(32, 8), (6, 1))), ("heterogeneous", heterogeneous_sharding(loads, cluster, 4))):
        busiest = 0
        for layer in range(6):
            rest = np.argsort(-loads[layer], kind="stable")[4:]
            busiest += np.bincount(owners[layer, rest], weights=loads[layer, rest], minlength=8).max()
        spread[name] = busiest
    assert spread["heterogeneous"] < 0.8 * spread["even"]


def test_experts_that_are_copied_anyway_stay_at_their_owners(skewed_counts):
    cluster = Cluster.even(2, 4)
    loads = np.stack([skewed_counts(8, 32).sum(axis=0) for _ in range(6)])
    current = np.tile(even_sharding(32, 8), (6, 1))
    top = np.argsort(-loads, axis=1, kind="stable")[:, :8]
    stay = [
        (np.take_along_axis(heterogeneous_sharding(loads, cluster, 8, given), top, 1) == np.take_along_axis(current, top, 1)).sum()
        for given in (None, current)
    ]
    assert stay[1] > stay[0]


def test_calibration_copies_an_unexpectedly_hot_expert_if_that_pays():
    cluster = Cluster.even(2, 2)
    owner = even_sharding(8, 4)
    predicted, counts = np.full(8, 100), np.full((4, 8), 100)
    counts[:, 5] = 40_000
    plan = sparse_materialization(predicted, owner, cluster, 1, 2)
    better = calibrate(counts, plan, cluster, COST, overlap_degree=2, extra_slots=2)
    better.validate(extra_slots=2)
    assert (better.holders >= plan.holders).all() and better.copies[5].any()
    times = [layer_time(split_even(counts, choice, cluster), choice, cluster, COST).total for choice in (plan, better)]
    assert times[1] < times[0]
    expensive = LayerCost(token_bytes=1000, expert_bytes=10**12, gradient_bytes=1_000_000, flops_per_token=1e6, hidden_forward=1e9)
    assert calibrate(counts, plan, cluster, expensive, overlap_degree=2, extra_slots=2) is plan
    assert calibrate(counts, plan, cluster, COST, overlap_degree=2, extra_slots=1).copies.sum(axis=0).max() <= 1
