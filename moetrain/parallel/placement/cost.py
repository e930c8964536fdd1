"""What a placement costs: modelled time of one MoE layer's forward and backward, break-even of a copy, and the traffic
of the sparse collectives.

An alpha-beta model: a collective takes a latency plus the bytes at its busiest node or rank over the bandwidth there;
links do not contend and kernels run at one speed. Letters: E experts, R ranks, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from moetrain.parallel.placement.dispatch import node_matrix, rank_loads
from moetrain.parallel.placement.plan import Booleans, Cluster, Integers, PlacementPlan, relays

Transport = Literal["direct", "two_stage", "striped"]


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Sizes and times of one MoE layer that do not depend on the placement."""

    token_bytes: int
    """Bytes of one token's activation on the wire: hidden size times bytes per value."""
    expert_bytes: int
    """Bytes of one expert's parameters on the wire."""
    gradient_bytes: int
    """Bytes of one expert's gradient on the wire."""
    flops_per_token: float
    """Floating-point operations of one expert's forward for one token."""
    hidden_forward: float = 0.0
    """Seconds of other work under which the forward's all-gather of experts runs."""
    hidden_backward: float = 0.0
    """Seconds of other work under which the backward's transfers of experts and gradients run."""
    rematerialize: bool = False
    """Copies are freed after the forward and gathered again for the backward."""

    def exposed_forward(self, gather: float) -> float:
        """Seconds that the forward waits for a gather of experts that takes ``gather``."""
        return max(0.0, gather - self.hidden_forward)

    def exposed_backward(self, gather: float, reduce: float) -> float:
        """Seconds that the backward waits for the reduction of gradients and, with re-materialisation, another gather."""
        return max(0.0, reduce + gather * self.rematerialize - self.hidden_backward)


@dataclass(frozen=True)
class LayerTime:
    """Seconds; ``exposed`` is what of the transfers of experts is not hidden, ``total`` forward and backward together."""

    all_to_all: float
    compute: float
    gather: float
    reduce: float
    exposed: float

    @property
    def total(self) -> float:
        """Four all-to-alls; expert computation once forward and, at twice the work, backward; what is exposed."""
        return 4 * self.all_to_all + 3 * self.compute + self.exposed


@dataclass(frozen=True, eq=False)
class Traffic:
    """What each rank sends and receives in a sparse all-gather, by tier of link; a sparse reduce-scatter swaps the two.

    The arrays, [R] int64, count pieces; an expert is ``pieces`` of them. intra: to and from ranks of the same node.
    """

    sent_intra: Integers
    sent_inter: Integers
    received_intra: Integers
    received_inter: Integers
    pieces: int = 1

    @cached_property
    def reversed(self) -> Traffic:
        """The reduce-scatter to this all-gather."""
        return Traffic(self.received_intra, self.received_inter, self.sent_intra, self.sent_inter, self.pieces)

    def time(self, cluster: Cluster, expert_bytes: int) -> float:
        """Seconds: the busiest direction of the busiest node and rank. 0 if nothing moves, not even the latency."""
        at_nodes = [cluster.membership @ part for part in (self.sent_inter, self.received_inter)]
        at_ranks = [self.sent_intra + self.sent_inter, self.received_intra + self.received_inter]
        piece = expert_bytes / self.pieces
        busiest = transfer_time(at_nodes, at_ranks, piece, cluster)
        return cluster.latency + busiest if busiest else 0.0


def transfer_time(at_nodes: list[Integers], at_ranks: list[Integers], unit_bytes: float, cluster: Cluster) -> float:
    """Seconds until the busiest node and the busiest rank are done; counts in units, one array per direction."""
    inter = max(int(part.max()) for part in at_nodes)
    intra = max(int(part.max()) for part in at_ranks)
    return max(inter * unit_bytes / cluster.inter_bandwidth, intra * unit_bytes / cluster.intra_bandwidth)


def gather_traffic(plan: PlacementPlan, cluster: Cluster, transport: Transport) -> Traffic:
    """Traffic of the sparse all-gather of ``plan``.

    direct: the owner sends to every holder. two_stage: the owner sends to the holders in its node and to one relay in
    every importing node (``relays``), which passes the expert on. striped: the owner cuts the expert into as many pieces
    as a node has ranks and gives its neighbours one each, each rank sends its piece to the rank in the same place of every
    importing node, and those give it to the node's holders. Holders in the owner's node get all pieces from the owner.

    Raises ValueError for striped transport between nodes of unequal size.
    """
    owner = PlacementPlan.owners_only(plan.owner, plan.num_ranks).holders.astype(np.int64)  # [E, R]
    copies = plan.copies.astype(np.int64)
    if transport == "direct":
        return tally(owner.T @ copies, cluster)
    in_owners_node = cluster.same_node[plan.owner]
    relay = relays(plan, cluster)
    if transport == "two_stage":
        first = (relay[:, :, None] == np.arange(plan.num_ranks)).sum(axis=1)
        moved = owner.T @ (copies * in_owners_node + first)
        for node, members in enumerate(cluster.members):
            entry = relay[:, node][:, None] == np.arange(plan.num_ranks)
            moved[:, members] += entry.T.astype(np.int64) @ copies[:, members]
        return tally(moved, cluster)
    if transport == "striped":
        sizes = sorted({members.size for members in cluster.members})
        if len(sizes) > 1:
            raise ValueError(f"striped transport needs nodes of equal size, found nodes of {sizes} ranks")
        return tally(striped_pieces(plan, cluster, owner, relay >= 0, sizes[0]), cluster, sizes[0])
    raise ValueError(f"transport {transport!r} is none of direct, two_stage, striped")


def striped_pieces(plan: PlacementPlan, cluster: Cluster, owner: Integers, imported: Booleans, pieces: int) -> Integers:
    """[R, R] pieces between ranks under striped transport; owner: [E, R] 1 at the owner; imported: [E, N]."""
    in_owners_node = cluster.same_node[plan.owner]
    leaves = imported.any(axis=1, keepdims=True)
    moved = owner.T @ (in_owners_node * np.where(plan.holders, pieces, leaves))
    between = cluster.membership @ owner.T @ imported  # [N, N] experts from node to node
    for node, members in enumerate(cluster.members):
        for other, others in enumerate(cluster.members):
            moved[members, others] += between[node, other]
        moved[np.ix_(members, members)] += (plan.holders[:, members] & imported[:, node, None]).sum(axis=0)
    return moved


def tally(moved: Integers, cluster: Cluster, pieces: int = 1) -> Traffic:
    """Traffic from ``moved`` [R, R], the pieces that each rank hands to each; to itself costs nothing."""
    moved = np.where(np.eye(cluster.num_ranks, dtype=bool), 0, moved)
    intra = np.where(cluster.same_node, moved, 0)
    inter = moved - intra
    return Traffic(intra.sum(axis=1), inter.sum(axis=1), intra.sum(axis=0), inter.sum(axis=0), pieces)


def layer_time(split: Integers, plan: PlacementPlan, cluster: Cluster, cost: LayerCost, *, transport: Transport = "two_stage") -> LayerTime:
    """Time of one layer whose tokens travel as in ``split`` [S, E, R] (from ``split_even`` or ``split_quota``).

    Copies that leave a node count as well as those that enter one, since the owners of hot experts may share a node.
    """
    between_nodes = node_matrix(split, cluster)
    between_ranks = split.sum(axis=1)
    for matrix in (between_nodes, between_ranks):
        np.fill_diagonal(matrix, 0)
    at_nodes, at_ranks = ([matrix.sum(axis=axis) for axis in (0, 1)] for matrix in (between_nodes, between_ranks))
    active = (split.sum(axis=0) > 0).sum(axis=0)
    traffic = gather_traffic(plan, cluster, transport)
    gather, reduce = traffic.time(cluster, cost.expert_bytes), traffic.reversed.time(cluster, cost.gradient_bytes)
    return LayerTime(
        all_to_all=cluster.latency + transfer_time(at_nodes, at_ranks, cost.token_bytes, cluster),
        compute=float((cluster.expert_latency * active + cost.flops_per_token / cluster.flops * rank_loads(split)).max()),
        gather=gather,
        reduce=reduce,
        exposed=cost.exposed_forward(gather) + cost.exposed_backward(gather, reduce),
    )


def break_even(cost: LayerCost) -> float:
    """Tokens of one node for one expert from which a copy of the expert in that node saves bytes between nodes, although
    no transfer is hidden: each token would cross four times, forward and backward, there and back."""
    moved = cost.expert_bytes * (2 if cost.rematerialize else 1) + cost.gradient_bytes
    return moved / (4 * cost.token_bytes)
