"""The two-level planner: against all sets of imports, and the balance and limits of its plans."""

from itertools import combinations, product

import numpy as np
import pytest

from moetrain.parallel.placement.cost import LayerCost, layer_time
from moetrain.parallel.placement.dispatch import rank_loads, split_even, split_quota
from moetrain.parallel.placement.plan import Cluster
from moetrain.parallel.placement.planners import even_sharding, owners_only, sparse_materialization
from moetrain.parallel.placement.two_level import choose_imports, two_level

HIDDEN = LayerCost(
    token_bytes=1536, expert_bytes=10**6, gradient_bytes=10**6, flops_per_token=5e6, hidden_forward=1e3, hidden_backward=1e3
)  # fmt: skip
EXPOSED = LayerCost(token_bytes=1536, expert_bytes=10**6, gradient_bytes=2 * 10**6, flops_per_token=5e6)


def seconds(imports, demand, owner_node, cluster, cost):
    """Time of sets of imports [sets, N, E] bool, written down from the definitions."""
    nodes = range(cluster.num_nodes)
    crossing = np.where(owner_node == np.arange(cluster.num_nodes)[:, None], 0, demand)
    left = np.where(imports, 0, crossing)
    leaving, entering = left.sum(2), np.stack([left[:, :, owner_node == node].sum((1, 2)) for node in nodes], 1)
    imported, exported = imports.sum(2), np.stack([imports[:, :, owner_node == node].sum((1, 2)) for node in nodes], 1)
    experts = np.maximum(imported, exported).max(1)
    gather = np.where(experts > 0, cluster.latency + experts * cost.expert_bytes / cluster.inter_bandwidth, 0)
    reduce = np.where(experts > 0, cluster.latency + experts * cost.gradient_bytes / cluster.inter_bandwidth, 0)
    exposed = np.maximum(gather - cost.hidden_forward, 0)
    exposed += np.maximum(reduce + (gather if cost.rematerialize else 0) - cost.hidden_backward, 0)
    load = (demand.sum(1) - leaving + entering) / [len(ids) for ids in cluster.members]
    tokens = np.maximum(leaving, entering).max(1)
    compute = 3 * load.max(1) * cost.flops_per_token / cluster.flops
    return 4 * tokens * cost.token_bytes / cluster.inter_bandwidth + compute + exposed


def all_imports(owner_node, nodes, most):
    """[sets, N, E] every set of imports with at most ``most`` experts of other nodes in a node."""
    experts = np.arange(owner_node.size)
    foreign = [experts[owner_node != node] for node in range(nodes)]
    subsets = [[np.isin(experts, chosen) for k in range(most + 1) for chosen in combinations(ids, k)] for ids in foreign]
    return np.array(list(product(*subsets)))


@pytest.mark.parametrize("flops_per_token", [0.0, 4e6])
@pytest.mark.parametrize(("nodes", "ranks_per_node", "extra_slots"), [(2, 1, 6), (2, 2, 1), (3, 2, 6), (3, 1, 2)])
def test_imports_against_all_sets_of_imports(nodes, ranks_per_node, extra_slots, flops_per_token, rng):
    experts = 6
    cluster = Cluster.even(nodes, ranks_per_node, inter_bandwidth=25e9, flops=300e12, latency=2e-6)
    owner_node = cluster.node[even_sharding(experts, cluster.num_ranks)]
    every = all_imports(owner_node, nodes, min(experts, extra_slots * ranks_per_node))
    ratios = []
    for _ in range(30):
        demand = np.rint(1000 * rng.lognormal(0, 1.3, experts) * rng.lognormal(0, 0.35, (nodes, experts))).astype(np.int64)
        # an expert as large as a part of an average expert's tokens up to some times as large
        size = int(1000 * demand.mean() * rng.choice([0.25, 1, 3]))
        window = rng.choice([0, 2]) * size / cluster.inter_bandwidth
        cost = LayerCost(
            token_bytes=1000, expert_bytes=size, gradient_bytes=size, flops_per_token=flops_per_token, hidden_forward=window,
            hidden_backward=2 * window, rematerialize=bool(rng.integers(2)),
        )  # fmt: skip
        imports = choose_imports(demand, owner_node, cluster, cost, extra_slots)
        assert imports.sum(axis=1).max() <= extra_slots * ranks_per_node
        best = seconds(every, demand, owner_node, cluster, cost).min()
        found = seconds(imports[None], demand, owner_node, cluster, cost)[0]
        assert found >= best - 1e-9
        ratios.append((found + 1e-9) / (best + 1e-9))
    assert np.mean(ratios) < 1.01 and max(ratios) < 1.1


def node_targets(loads, cluster):
    return np.array([loads[ids].mean() for ids in cluster.members])[cluster.node]


def test_hidden_copies_balance_every_node_to_a_token(cluster, skewed_counts, rng):
    for experts in (6, 24):
        counts = skewed_counts(cluster.num_ranks, experts, tokens=2000)
        owner = rng.integers(cluster.num_ranks, size=experts)
        plan = two_level(counts, owner, cluster, HIDDEN, extra_slots=experts)
        plan.validate(experts)
        loads = rank_loads(split_quota(counts, plan, cluster))
        targets = node_targets(loads, cluster)
        busiest = targets.argmax()
        assert loads.max() - loads[cluster.node == cluster.node[busiest]].mean() < 1
        if plan.copies.any():
            assert (loads - targets).max() < 1


@pytest.mark.parametrize("extra_slots", [0, 1, 2])
@pytest.mark.parametrize("cost", [HIDDEN, EXPOSED], ids=["hidden", "exposed"])
def test_slots_are_a_limit(extra_slots, cost, cluster, skewed_counts):
    counts = skewed_counts(cluster.num_ranks, 16, tokens=2000)
    plan = two_level(counts, even_sharding(16, cluster.num_ranks), cluster, cost, extra_slots)
    plan.validate(extra_slots)


def test_counts_of_nodes_and_of_ranks_give_the_same_plan(cluster, skewed_counts):
    counts = skewed_counts(cluster.num_ranks, 16)
    owner = even_sharding(16, cluster.num_ranks)
    plans = [two_level(given, owner, cluster, HIDDEN, 3) for given in (counts, cluster.membership @ counts)]
    assert np.array_equal(plans[0].holders, plans[1].holders)
    with pytest.raises(ValueError, match="counts have shape"):
        two_level(counts[:, :-1], owner, cluster, HIDDEN, 3)


def test_few_copies_balance_one_node(skewed_counts):
    """Owners keep what they can: about one copy per rank, not one per expert."""
    cluster = Cluster.even(1, 8)
    counts = skewed_counts(8, 64, tokens=4000)
    plan = two_level(counts, even_sharding(64, 8), cluster, HIDDEN, 8)
    assert 0 < plan.copies.sum() <= 8


@pytest.mark.parametrize("cluster", [Cluster.even(1, 8), Cluster.even(2, 4)])
def test_exposed_copies_are_not_made_for_balanced_loads(cluster, rng):
    counts = rng.multinomial(1024, np.full(16, 1 / 16), size=8)  # in a node of 4, 256 per expert: half of the break-even
    assert not two_level(counts, even_sharding(16, 8), cluster, EXPOSED, 4).copies.any()


@pytest.mark.parametrize("cost", [HIDDEN, EXPOSED], ids=["hidden", "exposed"])
def test_skewed_loads_take_less_time_than_with_owners_only_and_with_hottest_everywhere(cost, skewed_counts):
    cluster = Cluster.even(4, 4)
    owner = even_sharding(32, 16)
    times = {"owners": 0.0, "hottest": 0.0, "two-level": 0.0}
    for _ in range(5):
        counts = skewed_counts(16, 32, tokens=16_384)
        plans = {
            "owners": (owners_only(owner, 16), split_even),
            "hottest": (sparse_materialization(counts.sum(axis=0), owner, cluster, 4, 4), split_even),
            "two-level": (two_level(counts, owner, cluster, cost, 4), split_quota),
        }
        for name, (plan, split) in plans.items():
            times[name] += layer_time(split(counts, plan, cluster), plan, cluster, cost).total
    assert times["two-level"] < 0.8 * times["hottest"] < 0.8 * times["owners"]
