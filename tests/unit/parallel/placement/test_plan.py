"""Plans as data: validation, slots, remapped ids, messages, relays."""

import numpy as np
import pytest

from moetrain.parallel.placement.plan import Cluster, PlacementPlan, messages, relays


def test_slots_are_owned_experts_then_copies():
    plan = PlacementPlan.replicated([1, 0, 1, 0], np.array([True, False, True, False]), 2)
    assert plan.slots(0).tolist() == [1, 3, 0, 2] and plan.slots(1).tolist() == [0, 2]
    assert plan.copies.sum() == 2
    plan.validate(extra_slots=2)


def test_cluster_with_interleaved_nodes():
    cluster = Cluster((1, 0, 1))
    assert [ids.tolist() for ids in cluster.members] == [[1], [0, 2]]
    assert cluster.place.tolist() == [0, 0, 1]
    assert (cluster.membership @ np.array([5, 1, 2])).tolist() == [1, 7]


@pytest.mark.parametrize(
    ("owner", "holders", "remap", "extra_slots", "message"),
    [
        ([0, 2], np.eye(2), None, None, "owners must be ranks 0..1"),
        ([-1, 0], np.eye(2), None, None, "owners must be ranks 0..1"),
        ([0], np.eye(2), None, None, "owner has shape"),
        ([1, 1], np.eye(2), None, None, r"owners of experts \[0\]"),
        ([0, 1], np.ones((2, 2)), None, 0, "rank 0 holds 1 copies, at most 0 fit"),
        ([0, 1], np.eye(2), [0, 2], None, "must map to experts 0..1"),
    ],
)
def test_what_validate_refuses(owner, holders, remap, extra_slots, message):
    plan = PlacementPlan(np.array(owner), np.array(holders, dtype=bool), None if remap is None else np.array(remap))
    with pytest.raises(ValueError, match=message):
        plan.validate(extra_slots)


def test_counts_of_the_routers_ids_become_counts_of_experts():
    plan = PlacementPlan(np.array([0, 1]), np.eye(2, dtype=bool), remap=np.array([1, 0, 1]))
    plan.validate()
    assert plan.expert_counts(np.array([[1, 20, 300], [0, 5, 7]])).tolist() == [[20, 301], [5, 7]]
    counts = np.array([[1, 2]])
    assert np.array_equal(PlacementPlan.owners_only([0, 0], 1).expert_counts(counts), counts)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_messages_are_the_copies_in_ascending_order(density, cluster, random_plan):
    plan = random_plan(7, cluster, density)
    listed = messages(plan)
    assert listed == sorted(set(listed))
    assert all(source == plan.owner[expert] != destination for source, destination, expert in listed)
    made = np.zeros_like(plan.copies)
    for _, destination, expert in listed:
        made[expert, destination] = True
    assert np.array_equal(made, plan.copies)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_ones_gathered_and_summed_back_count_the_holders(density, cluster, random_plan):
    plan = random_plan(7, cluster, density)
    held = np.zeros((7, cluster.num_ranks))
    held[np.arange(7), plan.owner] = 1
    for source, destination, expert in messages(plan):
        held[expert, destination] = held[expert, source]
    summed = held[np.arange(7), plan.owner]
    for source, destination, expert in messages(plan):
        assert source == plan.owner[expert]
        summed[expert] += held[expert, destination]
    assert np.array_equal(held, plan.holders) and np.array_equal(summed, plan.holders.sum(axis=1))


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_every_importing_node_has_one_relay_that_holds_the_expert(density, cluster, random_plan):
    plan = random_plan(7, cluster, density)
    for expert, entry in enumerate(relays(plan, cluster)):
        for node, members in enumerate(cluster.members):
            imported = plan.holders[expert, members].any() and cluster.node_of[plan.owner[expert]] != node
            assert (entry[node] >= 0) == imported
            assert not imported or (entry[node] in members and plan.holders[expert, entry[node]])


def test_relays_of_owners_in_different_places_differ():
    cluster = Cluster.even(2, 4)
    plan = PlacementPlan.replicated([0, 1, 2, 3], np.ones(4, dtype=bool), 8)
    assert relays(plan, cluster)[:, 1].tolist() == [4, 5, 6, 7]
