"""Tokens to holders: conservation, the rule of equal parts, and minimal maximum loads."""

from itertools import chain, combinations

import numpy as np
import pytest

from moetrain.parallel.placement.dispatch import node_matrix, pour, rank_loads, split_even, split_quota, to_owners
from moetrain.parallel.placement.plan import Cluster, PlacementPlan

DENSITIES = [0.0, 0.1, 0.4, 1.0]


@pytest.mark.parametrize("split", [split_even, split_quota])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("num_experts", [1, 3, 16])
def test_tokens_are_conserved_and_go_to_holders_only(split, density, num_experts, cluster, random_plan, skewed_counts):
    for _ in range(5):
        plan, counts = random_plan(num_experts, cluster, density), skewed_counts(cluster.num_ranks, num_experts)
        x = split(counts, plan, cluster)
        assert x.dtype == np.int64 and x.min() >= 0
        assert np.array_equal(x.sum(axis=2), counts)
        assert not x.sum(axis=0)[~plan.holders].any()
        assert rank_loads(x).sum() == node_matrix(x, cluster).sum() == counts.sum()


@pytest.mark.parametrize("split", [split_even, split_quota])
def test_without_copies_tokens_go_to_owners(split, cluster, random_plan, skewed_counts):
    plan, counts = random_plan(9, cluster, 0), skewed_counts(cluster.num_ranks, 9)
    x = split(counts, plan, cluster)
    assert np.array_equal(x, to_owners(counts, plan))
    assert np.array_equal(rank_loads(x), [counts[:, plan.owner == rank].sum() for rank in range(cluster.num_ranks)])


@pytest.mark.parametrize("density", DENSITIES)
def test_even_rule_one_source_and_expert_at_a_time(density, cluster, random_plan, skewed_counts):
    plan, counts = random_plan(8, cluster, density), skewed_counts(cluster.num_ranks, 8)
    x = split_even(counts, plan, cluster)
    for source, expert in np.ndindex(*counts.shape):
        holders = np.flatnonzero(plan.holders[expert])
        near = [rank for rank in holders if cluster.node_of[rank] == cluster.node_of[source]]
        candidates = [source] if source in holders else near or list(holders)
        base, extra = divmod(int(counts[source, expert]), len(candidates))
        for j, rank in enumerate(candidates):
            assert x[source, expert, rank] == base + ((j - source) % len(candidates) < extra)


def test_even_remainders_of_different_sources_go_to_different_holders():
    cluster = Cluster.even(1, 6)
    plan = PlacementPlan(np.array([0]), np.array([[True, True, True, False, False, False]]))
    x = split_even(np.array([[0], [0], [0], [1], [1], [1]]), plan, cluster)
    assert rank_loads(x).tolist() == [1, 1, 1, 0, 0, 0]


def smallest_maximum(demand, held):
    """The largest load of a rank that no assignment can avoid: a set of ranks computes at least the tokens of the experts
    that are held nowhere else."""
    ranks = range(held.shape[1])
    subsets = chain.from_iterable(combinations(ranks, size) for size in range(1, held.shape[1] + 1))
    bounds = []
    for subset in subsets:
        elsewhere = [rank for rank in ranks if rank not in subset]
        bounds.append(-(-int(demand[~held[:, elsewhere].any(axis=1)].sum()) // len(subset)))
    return max(bounds)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("num_experts", [3, 12])
def test_quotas_reach_the_smallest_maximum_in_every_node(density, num_experts, cluster, random_plan, skewed_counts):
    for _ in range(5):
        plan, counts = random_plan(num_experts, cluster, density), skewed_counts(cluster.num_ranks, num_experts)
        x = split_quota(counts, plan, cluster)
        for node, members in enumerate(cluster.members):
            held = plan.holders[:, members]
            demand = np.zeros(num_experts, dtype=np.int64)
            for other, sources in enumerate(cluster.members):
                stays = plan.holders[:, sources].any(axis=1)
                computed_here = stays if other == node else ~stays & (cluster.node[plan.owner] == node)
                demand += np.where(computed_here, counts[sources].sum(axis=0), 0)
            present = held.any(axis=1)
            assert not demand[~present].any() and np.array_equal(x[:, :, members].sum(axis=(0, 2)), demand)
            assert rank_loads(x)[members].max() == smallest_maximum(demand[present], held[present])


def test_quotas_are_balanced_to_a_token_along_a_chain_of_shared_experts():
    """Rank i shares its expert with rank i + 1: what the first ranks have too much passes through all of them to the last."""
    ranks = 12
    owner = np.arange(ranks)
    holders = (owner[:, None] == owner) | (owner[:, None] + 1 == owner)
    counts = np.tile(np.linspace(120, 80, ranks).astype(np.int64), (ranks, 1))
    loads = rank_loads(split_quota(counts, PlacementPlan(owner, holders), Cluster.even(1, ranks)))
    assert loads.max() - loads.mean() < 1


def test_quotas_are_exact_with_few_tokens_per_source():
    """Rounding every source's split alike would send all 32 single tokens to the same rank."""
    cluster = Cluster.even(1, 32)
    plan = PlacementPlan(np.array([0]), np.arange(32)[None] < 2)
    assert rank_loads(split_quota(np.ones((32, 1), dtype=np.int64), plan, cluster))[:2].tolist() == [16, 16]


def test_nothing_travels_when_every_rank_holds_everything_and_has_equal_work(cluster, rng):
    ranks = cluster.num_ranks
    counts = rng.multinomial(100, np.full(8, 1 / 8), size=ranks)
    x = split_quota(counts, PlacementPlan(np.zeros(8, dtype=np.int64), np.ones((8, ranks), dtype=bool)), cluster)
    assert np.array_equal(x.diagonal(axis1=0, axis2=2), counts.T)


@pytest.mark.parametrize("amount", [0, 1, 7, 100])
@pytest.mark.parametrize("levels", [[5], [0, 0, 0], [3, 9, 1, 1], [50, 2, 200]])
def test_pour_fills_the_lowest_levels(amount, levels):
    added = pour(amount, levels)
    after = [level + more for level, more in zip(levels, added, strict=True)]
    assert sum(added) == amount and min(added) >= 0
    wet = [level for level, more in zip(after, added, strict=True) if more]
    assert not wet or (max(wet) - min(wet) <= 1 and max(wet) - 1 <= min(after))
