"""Rules of other systems as placements."""

import numpy as np
import pytest

from moetrain.parallel.placement.baselines import eplb, eplb_slots, pack, replicate, shadowed_experts, split_equally
from moetrain.parallel.placement.dispatch import rank_loads


@pytest.mark.parametrize("num_experts", [3, 12, 16])
@pytest.mark.parametrize("extra_slots", [0, 1, 3])
def test_eplb_gives_every_expert_an_owner_that_holds_it(num_experts, extra_slots, cluster, rng):
    ranks = cluster.num_ranks
    owner = rng.integers(ranks, size=num_experts)
    for loads in (rng.integers(1, 1000, size=num_experts), np.zeros(num_experts, dtype=np.int64)):
        plan = eplb(loads, owner, cluster, extra_slots)
        plan.validate()
        assert (plan.holders.sum(axis=0) <= -(-num_experts // ranks) + extra_slots).all()
        stays = plan.holders[np.arange(num_experts), owner]
        assert np.array_equal(plan.owner[stays], owner[stays])


def test_eplb_groups_stay_in_their_node(rng):
    loads = rng.integers(1, 1000, size=24)
    slots = eplb_slots(loads, 40, num_groups=6, num_nodes=2, num_ranks=8).reshape(2, 20)
    nodes_of_group = [{node for node in range(2) if (slots[node] // 4 == group).any()} for group in range(6)]
    assert all(len(nodes) == 1 for nodes in nodes_of_group)


@pytest.mark.parametrize(("replicas", "ranks"), [(7, 1), (9, 2), (10, 4)])
def test_eplb_refuses_slots_that_cannot_be_shared_out(replicas, ranks):
    with pytest.raises(ValueError, match=f"{replicas} replicas of 8 experts"):
        eplb_slots(np.arange(8), replicas, num_groups=1, num_nodes=1, num_ranks=ranks)


def test_replicas_go_to_the_hottest():
    assert replicate([10, 30, 4], 6) == [0, 1, 2, 1, 1, 0]


def test_packs_are_of_equal_size_and_filled_by_weight():
    assert pack([5, 9, 1, 4], 2) == [[1, 2], [0, 3]]
    assert pack([5, 9, 1], 3) == [[0], [1], [2]]


def test_equal_parts_over_all_holders(cluster, random_plan, skewed_counts):
    plan, counts = random_plan(9, cluster, 0.4), skewed_counts(cluster.num_ranks, 9)
    split = split_equally(counts, plan, cluster)
    assert np.array_equal(split.sum(axis=2), counts) and not split.sum(axis=0)[~plan.holders].any()
    per_holder = counts[:, :, None] / plan.holders.sum(axis=1)[:, None]
    assert (np.abs(split - per_holder)[:, plan.holders] < 1).all()
    assert rank_loads(split).sum() == counts.sum()


def test_shadowing_stops_at_the_first_expert_that_does_not_pay():
    loads = np.array([5, 100, 0, 60, 58])
    assert shadowed_experts(loads, 1.0, 10.0).tolist() == [False, True, False, False, False]  # 60 -> 58 gains 2
    assert shadowed_experts(loads, 1.0, 1.0).tolist() == [True, True, False, True, True]
    assert not shadowed_experts(loads, 1.0, 1000.0).any()
    assert not shadowed_experts(np.zeros(3, dtype=np.int64), 1.0, 1.0).any()
