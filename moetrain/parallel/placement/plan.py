"""A placement is a sparse experts x ranks matrix: which ranks hold a computable copy of each expert.

Letters: E experts, R ranks, N nodes. Arrays are numpy; counts are int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True)
class Cluster:
    """Ranks, the nodes that they are on, and what links and processors deliver.

    node_of: node of each rank, nodes numbered from 0. intra_bandwidth: bytes/s that a rank sends to (and receives
    from) ranks of its node; inter_bandwidth: bytes/s that a *node* sends to (and receives from) other nodes.
    latency: seconds per collective. flops: FLOP/s of a rank in expert computation. expert_latency: seconds per
    active expert on a rank.
    """

    node_of: tuple[int, ...]
    intra_bandwidth: float = 200e9
    inter_bandwidth: float = 25e9
    latency: float = 20e-6
    flops: float = 300e12
    expert_latency: float = 0.0

    @classmethod
    def even(cls, nodes: int, ranks_per_node: int, **links: float) -> Cluster:
        """``nodes`` times ``ranks_per_node`` ranks, numbered node by node."""
        return cls(tuple(rank // ranks_per_node for rank in range(nodes * ranks_per_node)), **links)

    @property
    def num_ranks(self) -> int:
        return len(self.node_of)

    @property
    def num_nodes(self) -> int:
        return max(self.node_of) + 1

    @cached_property
    def node(self) -> Integers:
        """[R] node of each rank."""
        return np.asarray(self.node_of, dtype=np.int64)

    @cached_property
    def members(self) -> tuple[Integers, ...]:
        """Ranks of each node, ascending."""
        return tuple(np.flatnonzero(self.node == node) for node in range(self.num_nodes))

    @cached_property
    def place(self) -> Integers:
        """[R] position of each rank among the ranks of its node."""
        return np.array([int((self.node[:rank] == node).sum()) for rank, node in enumerate(self.node_of)], dtype=np.int64)

    @cached_property
    def same_node(self) -> Booleans:
        """[R, R] whether two ranks are on one node."""
        return np.equal.outer(self.node, self.node)

    @cached_property
    def membership(self) -> Integers:
        """[N, R] 1 where the rank is on the node: ``membership @ x`` sums over the ranks of each node."""
        return (self.node == np.arange(self.num_nodes)[:, None]).astype(np.int64)


@dataclass(frozen=True, eq=False)
class PlacementPlan:
    """For one MoE layer and step: the owner of each expert and all holders of a copy, the owner included.

    owner: [E] int64. holders: [E, R] bool. A rank's slots are its owned experts by id, then its copies by owner and
    id, which is the order in which one all-to-all delivers them. remap: [ids of the router] int64, the expert behind each
    of the router's ids, when several ids share one expert (merged experts); None: the ids are the experts.
    """

    owner: Integers
    holders: Booleans
    remap: Integers | None = None

    @classmethod
    def owners_only(cls, owner: Sequence[int] | Integers, ranks: int) -> PlacementPlan:
        """No copies: expert parallelism."""
        owner = np.asarray(owner, dtype=np.int64)
        return cls(owner, owner[:, None] == np.arange(ranks))

    @classmethod
    def replicated(cls, owner: Sequence[int] | Integers, experts: Booleans, ranks: int) -> PlacementPlan:
        """The given experts ([E] bool) on every rank, the others at their owners only."""
        alone = cls.owners_only(owner, ranks)
        return cls(alone.owner, alone.holders | np.asarray(experts)[:, None])

    @property
    def num_experts(self) -> int:
        return self.holders.shape[0]

    @property
    def num_ranks(self) -> int:
        return self.holders.shape[1]

    @cached_property
    def copies(self) -> Booleans:
        """[E, R] bool: holders without the owner."""
        return self.holders & (self.owner[:, None] != np.arange(self.num_ranks))

    def owned(self, rank: int) -> Integers:
        """Ids of the experts that a rank owns, ascending."""
        return np.flatnonzero(self.owner == rank)

    def copied(self, rank: int) -> Integers:
        """Ids of the experts of which a rank holds a copy without owning them, by owner and id."""
        ids = np.flatnonzero(self.copies[:, rank])
        return ids[np.argsort(self.owner[ids], kind="stable")]

    def slots(self, rank: int) -> Integers:
        """Ids of all experts that a rank can compute, in the order of its slots."""
        return np.concatenate([self.owned(rank), self.copied(rank)])

    def expert_counts(self, counts: Integers) -> Integers:
        """[..., E] tokens per expert from [..., ids of the router] tokens per id."""
        if self.remap is None:
            return counts
        return counts @ (self.remap[:, None] == np.arange(self.num_experts)).astype(np.int64)

    def validate(self, extra_slots: int | None = None) -> None:
        """Raises ValueError unless every expert has one owner among the ranks, the owner holds it, no rank has more than
        ``extra_slots`` copies (None: any number), and the router's ids stand for experts of this plan."""
        if self.owner.shape != (self.num_experts,):
            raise ValueError(f"owner has shape {self.owner.shape}, expected ({self.num_experts},)")
        if self.num_experts and not (self.owner.min() >= 0 and self.owner.max() < self.num_ranks):
            raise ValueError(f"owners must be ranks 0..{self.num_ranks - 1}, found {self.owner.min()}..{self.owner.max()}")
        missing = np.flatnonzero(~self.holders[np.arange(self.num_experts), self.owner])
        if missing.size:
            raise ValueError(f"the owners of experts {missing.tolist()} are not among their holders")
        copies = self.copies.sum(axis=0)
        if extra_slots is not None and copies.max(initial=0) > extra_slots:
            rank = int(copies.argmax())
            raise ValueError(f"rank {rank} holds {copies[rank]} copies, at most {extra_slots} fit")
        if self.remap is not None and self.remap.size and not (self.remap.min() >= 0 and self.remap.max() < self.num_experts):
            raise ValueError(f"the router's ids must map to experts 0..{self.num_experts - 1}, found {self.remap.tolist()}")


def messages(plan: PlacementPlan) -> list[tuple[int, int, int]]:
    """(source, destination, expert) of every copy when owners send straight to holders, in ascending order.

    The sparse all-gather sends along these messages, the sparse reduce-scatter against them.
    """
    expert, destination = np.nonzero(plan.copies)
    return sorted(zip(plan.owner[expert].tolist(), destination.tolist(), expert.tolist(), strict=True))


def relays(plan: PlacementPlan, cluster: Cluster) -> Integers:
    """[E, N] the holder through which an expert enters each node that imports it; -1 for its owner's node and for nodes
    without it.

    It is the first holder at or cyclically after the owner's place within its own node: owners in different places then
    use different ranks, and with them different network cards, of the importing node.
    """
    chosen = np.full((plan.num_experts, cluster.num_nodes), -1, dtype=np.int64)
    place = cluster.place[plan.owner]
    for node, members in enumerate(cluster.members):
        distance = (np.arange(members.size) - place[:, None]) % members.size
        held = plan.holders[:, members]
        nearest = np.where(held, distance, members.size).argmin(axis=1)
        imported = held.any(axis=1) & (cluster.node[plan.owner] != node)
        chosen[imported, node] = members[nearest[imported]]
    return chosen
