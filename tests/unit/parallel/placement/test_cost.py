"""The time model and the traffic of the sparse collectives by transport."""

import numpy as np
import pytest

from moetrain.parallel.placement.cost import LayerCost, break_even, gather_traffic, layer_time
from moetrain.parallel.placement.dispatch import split_even, split_quota
from moetrain.parallel.placement.plan import Cluster, PlacementPlan
from moetrain.parallel.placement.planners import even_sharding, everywhere, owners_only

CLUSTER = Cluster.even(2, 2, intra_bandwidth=100.0, inter_bandwidth=10.0, latency=0.5, flops=1000.0, expert_latency=0.25)
COST = LayerCost(token_bytes=2, expert_bytes=60, gradient_bytes=120, flops_per_token=50)


def direct_by_hand(plan, cluster):
    sent, received = np.zeros((2, cluster.num_ranks), int), np.zeros((2, cluster.num_ranks), int)
    for expert, rank in np.argwhere(plan.copies):
        tier = int(cluster.node_of[plan.owner[expert]] != cluster.node_of[rank])
        sent[tier, plan.owner[expert]] += 1
        received[tier, rank] += 1
    return sent, received


@pytest.mark.parametrize("density", [0.0, 0.2, 0.6, 1.0])
def test_direct_traffic_is_one_message_per_copy(density, cluster, random_plan):
    plan = random_plan(9, cluster, density)
    traffic = gather_traffic(plan, cluster, "direct")
    sent, received = direct_by_hand(plan, cluster)
    assert np.array_equal([traffic.sent_intra, traffic.sent_inter], sent)
    assert np.array_equal([traffic.received_intra, traffic.received_inter], received)
    assert np.array_equal(traffic.reversed.sent_inter, traffic.received_inter)


@pytest.mark.parametrize("density", [0.0, 0.2, 0.6, 1.0])
def test_two_stages_send_each_expert_once_into_a_node(density, cluster, random_plan):
    plan = random_plan(9, cluster, density)
    traffic = gather_traffic(plan, cluster, "two_stage")
    assert np.array_equal(traffic.received_intra + traffic.received_inter, plan.copies.sum(axis=0))
    held = cluster.membership @ plan.holders.T > 0
    imports = held & (cluster.node[plan.owner] != np.arange(cluster.num_nodes)[:, None])
    assert np.array_equal(cluster.membership @ traffic.received_inter, imports.sum(axis=1))
    assert traffic.sent_intra.sum() == traffic.received_intra.sum() and traffic.sent_inter.sum() == imports.sum()


@pytest.mark.parametrize("density", [0.0, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("cluster", [Cluster.even(2, 4), Cluster.even(1, 3), Cluster.even(3, 1), Cluster((0, 1, 1, 0))])
def test_stripes_use_every_rank_of_a_node_alike(density, cluster, random_plan):
    plan = random_plan(9, cluster, density)
    traffic, two_stage = gather_traffic(plan, cluster, "striped"), gather_traffic(plan, cluster, "two_stage")
    assert traffic.pieces == len(cluster.members[0])
    for members in cluster.members:
        assert len(set(traffic.received_inter[members])) == len(set(traffic.sent_inter[members])) == 1
    assert np.array_equal(cluster.membership @ traffic.received_inter, traffic.pieces * (cluster.membership @ two_stage.received_inter))
    # whoever holds a copy has received all of its pieces
    assert (traffic.received_intra + traffic.received_inter >= traffic.pieces * plan.copies.sum(axis=0)).all()


def test_stripes_by_hand():
    """Expert 0 of rank 0 goes to rank 3: two pieces cross, over both ranks, one on each side makes a second hop."""
    plan = PlacementPlan(np.array([0]), np.array([[True, False, False, True]]))
    traffic = gather_traffic(plan, CLUSTER, "striped")
    assert traffic.sent_intra.tolist() == [1, 0, 1, 0] and traffic.received_intra.tolist() == [0, 1, 0, 1]
    assert traffic.sent_inter.tolist() == [1, 1, 0, 0] and traffic.received_inter.tolist() == [0, 0, 1, 1]


def test_what_transports_refuse():
    plan = owners_only(np.array([0]), 3)
    with pytest.raises(ValueError, match="nodes of equal size"):
        gather_traffic(plan, Cluster((0, 0, 1)), "striped")
    with pytest.raises(ValueError, match="transport 'pigeon'"):
        gather_traffic(plan, Cluster((0, 0, 1)), "pigeon")


def test_layer_time_by_hand():
    counts = np.zeros((4, 2), dtype=np.int64)
    counts[0] = [3, 10]  # expert 0 stays on rank 0, 10 tokens go to rank 2 in the other node
    counts[3] = [0, 4]  # to rank 2 in the same node
    plan = owners_only(np.array([0, 2]), 4)
    time = layer_time(split_even(counts, plan, CLUSTER), plan, CLUSTER, COST)
    assert time.all_to_all == pytest.approx(0.5 + max(10 * 2 / 10, 14 * 2 / 100))
    assert time.compute == pytest.approx(max(0.25 + 3 * 0.05, 0.25 + 14 * 0.05))
    assert time.gather == time.reduce == time.exposed == 0
    assert time.total == pytest.approx(4 * time.all_to_all + 3 * time.compute)


@pytest.mark.parametrize("rematerialize", [False, True])
def test_only_what_is_not_hidden_counts(rematerialize):
    plan = everywhere(np.array([0, 0]), 4)  # both experts enter node 1, and each rank other than 0
    counts = np.ones((4, 2), dtype=np.int64)
    cost = LayerCost(
        token_bytes=2, expert_bytes=60, gradient_bytes=120, flops_per_token=50, hidden_forward=4.0, hidden_backward=20.0,
        rematerialize=rematerialize,
    )  # fmt: skip
    time = layer_time(split_quota(counts, plan, CLUSTER), plan, CLUSTER, cost)
    assert time.gather == pytest.approx(0.5 + 2 * 60 / 10) and time.reduce == pytest.approx(0.5 + 2 * 120 / 10)
    backward = 24.5 + (12.5 if rematerialize else 0)
    assert time.exposed == pytest.approx(12.5 - 4 + backward - 20)


def test_owners_that_share_a_node_make_it_the_bottleneck():
    """Every other node imports one expert only, but one node sends them all."""
    cluster = Cluster.even(4, 1, inter_bandwidth=10.0, intra_bandwidth=1e9, latency=0.0)
    plan = PlacementPlan(
        np.array([0, 0, 0]), np.array([[True, True, False, False], [True, False, True, False], [True, False, False, True]])
    )
    assert gather_traffic(plan, cluster, "two_stage").time(cluster, 60) == pytest.approx(3 * 60 / 10)


@pytest.mark.parametrize("rematerialize", [False, True])
def test_break_even_of_two_matrix_experts_is_their_width(rematerialize):
    hidden, width, value = 8, 48, 2
    size = 2 * hidden * width * value
    cost = LayerCost(token_bytes=hidden * value, expert_bytes=size, gradient_bytes=size, flops_per_token=1, rematerialize=rematerialize)
    assert break_even(cost) == (1.5 * width if rematerialize else width)


def test_more_tokens_and_slower_links_take_longer(skewed_counts):
    counts = skewed_counts(4, 8) + 1
    plan = owners_only(even_sharding(8, 4), 4)
    slow, fast = (Cluster.even(2, 2, inter_bandwidth=bandwidth) for bandwidth in (1e8, 1e9))
    base, more, slower = (
        layer_time(split_even(scale * counts, plan, cluster), plan, cluster, COST).total
        for scale, cluster in ((1, fast), (2, fast), (1, slow))
    )
    assert base < more and base < slower
