"""SparseAllGather and SparseReduceScatter: what arrives, what is summed, and the bytes that it takes."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moetrain.parallel.collectives import Peers, traffic
from moetrain.parallel.placement.cost import gather_traffic
from moetrain.parallel.placement.plan import Cluster, PlacementPlan
from moetrain.parallel.transport import Route, sparse_all_gather, sparse_reduce_scatter
from moetrain.testing.distributed import run_distributed

EXPERTS, SIZE = 5, 12
CLUSTERS = {1: Cluster((0,)), 2: Cluster((0, 1)), 4: Cluster((0, 0, 1, 1)), 6: Cluster((0, 0, 1, 1, 2, 2))}


def random_plan(ranks, seed, density):
    rng = np.random.default_rng(seed)
    owner = rng.integers(ranks, size=EXPERTS)
    holders = rng.random((EXPERTS, ranks)) < density
    holders[np.arange(EXPERTS), owner] = True
    return PlacementPlan(owner, holders)


def weights(expert, dtype):
    return torch.arange(SIZE, dtype=dtype) + 100 * expert


def gradient(expert, rank, dtype):
    return torch.arange(SIZE, dtype=dtype) * 0.5 + 10 * expert + rank


def move(rank, world_size, plan, transport, dtype):
    peers, cluster = Peers(dist.group.WORLD, CLUSTERS[world_size].node_of), CLUSTERS[world_size]
    stack = lambda rows: torch.stack(rows) if rows else torch.empty(0, SIZE, dtype=dtype)  # noqa: E731
    traffic.clear()
    copies = sparse_all_gather(stack([weights(e, dtype) for e in plan.owned(rank).tolist()]), plan, cluster, peers, transport)
    assert torch.equal(copies, stack([weights(e, dtype) for e in plan.copied(rank).tolist()]))
    gathered = {tier: traffic.bytes["sparse_all_gather", tier] for tier in ("intra", "inter")}
    sums = sparse_reduce_scatter(stack([gradient(e, rank, dtype) for e in plan.copied(rank).tolist()]), plan, cluster, peers, transport)
    expected = {
        e: sum(gradient(e, r, dtype) for r in np.flatnonzero(plan.copies[e]).tolist())
        for e in plan.owned(rank).tolist()
        if plan.copies[e].any()
    }
    assert sums.keys() == expected.keys()
    for expert, value in expected.items():
        assert torch.equal(sums[expert].to(dtype), value)
    reduced = {tier: traffic.bytes["sparse_reduce_scatter", tier] for tier in ("intra", "inter")}
    return gathered, reduced


@pytest.mark.parametrize("transport", ["direct", "two_stage", "striped"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 6])
@pytest.mark.parametrize(("seed", "density"), [(0, 0.0), (1, 0.4), (2, 1.0)])
def test_copies_arrive_and_their_gradients_are_summed_with_the_bytes_of_the_model(ranks, transport, seed, density):
    plan = random_plan(ranks, seed, density)
    expected = gather_traffic(plan, CLUSTERS[ranks], transport)
    piece = SIZE * 8 // expected.pieces
    for rank, (gathered, reduced) in enumerate(run_distributed(move, ranks, plan, transport, torch.float64)):
        assert gathered == {"intra": expected.sent_intra[rank] * piece, "inter": expected.sent_inter[rank] * piece}
        assert reduced == {"intra": expected.received_intra[rank] * piece, "inter": expected.received_inter[rank] * piece}


def test_bytes_are_those_of_the_dtype_on_the_wire():
    plan = random_plan(4, 1, 0.4)
    direct = gather_traffic(plan, CLUSTERS[4], "direct")
    for rank, (gathered, reduced) in enumerate(run_distributed(move, 4, plan, "direct", torch.bfloat16)):
        assert gathered["inter"] == direct.sent_inter[rank] * SIZE * 2
        assert reduced["inter"] == direct.received_inter[rank] * SIZE * 2


@pytest.mark.parametrize("transport", ["direct", "two_stage", "striped"])
def test_each_piece_reaches_each_holder_once(transport):
    for seed in range(20):
        plan, cluster = random_plan(6, seed, 0.4), CLUSTERS[6]
        route = Route.of(plan, cluster, transport)
        held = {(int(plan.owner[e]), e, s) for e in range(EXPERTS) for s in range(route.stripes)}
        for stage in route.stages:
            arrived = {(m.destination, *m.piece) for m in stage}
            assert len(arrived) == len(stage) and not arrived & held
            assert {(m.source, *m.piece) for m in stage} <= held
            held |= arrived
        assert {(int(r), int(e), s) for e, r in zip(*plan.holders.nonzero(), strict=True) for s in range(route.stripes)} <= held


def lose_a_rank(rank, world_size):
    from datetime import timedelta

    group = dist.new_group(timeout=timedelta(seconds=2))
    if rank == 1:
        return
    plan = PlacementPlan(np.array([0, 1]), np.ones((2, 2), dtype=bool))
    sparse_all_gather(torch.ones(1, 4), plan, CLUSTERS[2], Peers(group, (0, 1)))


def test_a_rank_that_does_not_come_is_an_error_that_names_rank_and_operation():
    with pytest.raises(Exception, match="rank 0: sparse_all_gather among 2 ranks failed"):
        run_distributed(lose_a_rank, 2)
