"""The two-level planner: first which experts every node imports, then which ranks of a node compute them.

Beyond Hecate (arXiv 2502.02581), whose algorithm copies the hottest experts everywhere. Level 1 weighs, between nodes,
the tokens that no longer travel against the experts that do. Only the largest number of imports of a node is paid for, so
for a given number k each node may import its k most wanted foreign experts; all k are evaluated at once from prefix sums,
and the best few are repaired by swaps where one node still receives too much. Level 2 spreads, inside nodes, what the
busiest rank has too much.

Letters: E experts, R ranks, N nodes. Modelled times are compared as integer nanoseconds.
"""

from __future__ import annotations

import numpy as np

from moetrain.parallel.placement.cost import LayerCost
from moetrain.parallel.placement.plan import Booleans, Cluster, Integers, PlacementPlan

CANDIDATES = 3
"""Numbers of imports that are repaired by swaps and compared; trying all gains at most a few per cent."""


def two_level(counts: Integers, owner: Integers, cluster: Cluster, cost: LayerCost, extra_slots: int) -> PlacementPlan:
    """Copies that balance nodes and ranks, with at most ``extra_slots`` on a rank; to be used with ``split_quota``.

    counts: [N, E] or [R, E] int64, predicted tokens of each node or rank for each expert. owner: [E] int64. As long as other
    work hides the copies' transfers and slots suffice, the predicted loads inside a node differ from their mean by less than
    a token; beyond that, copies are made only if the modelled time of the layer falls.

    Raises ValueError if the counts have another shape.
    """
    owner = np.asarray(owner, dtype=np.int64)
    if counts.shape not in ((cluster.num_nodes, owner.size), (cluster.num_ranks, owner.size)):
        raise ValueError(f"counts have shape {counts.shape}, expected [{cluster.num_nodes} or {cluster.num_ranks}, {owner.size}]")
    demand = counts if len(counts) == cluster.num_nodes else cluster.membership @ counts
    foreign = cluster.node[owner] != np.arange(cluster.num_nodes)[:, None]
    crossing = np.where(foreign, demand, 0)
    imports = choose_imports(crossing, cluster.node[owner], cluster, cost, extra_slots)

    def time(imports: Booleans, spread: Spread) -> int:
        tokens = busiest(imports, crossing, cluster.node[owner])
        copies = extra_slots - int(spread.free.min())
        return int(modelled_time(cluster, cost, tokens=tokens, imports=imports.sum(axis=1).max(), copies=copies, load=spread.loads.max()))

    nothing = np.zeros_like(imports)
    without_copies = time(nothing, Spread(demand, owner, nothing, cluster, extra_slots))
    spread = Spread(demand, owner, imports, cluster, extra_slots)
    best, kept = time(imports, spread), len(spread.copies)
    while spread.relieve_one():
        now = time(imports, spread)
        if now <= best:
            best, kept = now, len(spread.copies)
    plan = PlacementPlan.owners_only(owner, cluster.num_ranks)
    if best < without_copies:
        expert, rank = np.array(spread.copies[:kept], dtype=np.int64).reshape(-1, 2).T
        plan.holders[expert, rank] = True
    return plan


def modelled_time(
    cluster: Cluster,
    cost: LayerCost,
    *,
    tokens: Integers | np.int64,
    imports: Integers | np.int64,
    copies: Integers | int = 0,
    load: Integers | np.int64 | int = 0,
) -> Integers:
    """Nanoseconds, int64, of one layer's forward and backward, as far as they depend on the placement.

    tokens: that the busiest node sends or receives; imports: of the node with most, copies: of the rank with most;
    load: tokens that the busiest rank computes. Scalars or arrays of one shape.
    """

    def transfer(size: int) -> np.ndarray:
        seconds = np.maximum(imports * (size / cluster.inter_bandwidth), copies * (size / cluster.intra_bandwidth))
        return np.where(seconds > 0, seconds + cluster.latency, 0)

    gather, reduce = transfer(cost.expert_bytes), transfer(cost.gradient_bytes)
    forward = np.maximum(gather - cost.hidden_forward, 0)
    backward = np.maximum(reduce + gather * cost.rematerialize - cost.hidden_backward, 0)
    all_to_all = tokens * (cost.token_bytes / cluster.inter_bandwidth)
    compute = load * (cost.flops_per_token / cluster.flops)
    return np.rint(1e9 * (4 * all_to_all + 3 * compute + forward + backward)).astype(np.int64)


def choose_imports(crossing: Integers, owner_node: Integers, cluster: Cluster, cost: LayerCost, extra_slots: int) -> Booleans:
    """Level 1: [N, E] bool, the experts of other nodes that each node is to have a copy of.

    crossing: [N, E] int64 tokens of each node for experts of other nodes. owner_node: [E] int64.
    """
    wanted = np.argsort(-crossing, axis=1, kind="stable")
    slots = np.array([ids.size for ids in cluster.members]) * extra_slots
    limit = np.minimum(slots, (crossing > 0).sum(axis=1))
    taken = np.minimum(np.arange(int(limit.max()) + 1), limit[:, None])  # [N, k] imports of each node, given k
    saved = np.take_along_axis(crossing, wanted, axis=1).cumsum(axis=1)
    saved = np.concatenate([np.zeros((len(crossing), 1), dtype=np.int64), saved], axis=1)
    leaving = crossing.sum(axis=1, keepdims=True) - np.take_along_axis(saved, taken, axis=1)
    lower_bound = modelled_time(cluster, cost, tokens=leaving.max(axis=0), imports=taken.max(axis=0))

    best, best_time = np.zeros_like(crossing, dtype=bool), None
    for k in np.argsort(lower_bound, kind="stable")[:CANDIDATES]:
        imports = np.zeros_like(crossing, dtype=bool)
        np.put_along_axis(imports, wanted, np.arange(crossing.shape[1]) < taken[:, k, None], axis=1)
        swap_imports(imports, crossing, owner_node)
        tokens = busiest(imports, crossing, owner_node)
        time = modelled_time(cluster, cost, tokens=tokens, imports=imports.sum(axis=1).max())
        if best_time is None or time < best_time:
            best, best_time = imports, time
    return best


def node_traffic(imports: Booleans, crossing: Integers, owner_node: Integers) -> tuple[Integers, Integers]:
    """Tokens that leave and that enter each node, both [N] int64."""
    left = np.where(imports, 0, crossing)
    entering = np.zeros(len(crossing), dtype=np.int64)
    np.add.at(entering, owner_node, left.sum(axis=0))
    return left.sum(axis=1), entering


def busiest(imports: Booleans, crossing: Integers, owner_node: Integers) -> np.int64:
    """Tokens of the busiest node and direction."""
    return max(part.max() for part in node_traffic(imports, crossing, owner_node))


def swap_imports(imports: Booleans, crossing: Integers, owner_node: Integers) -> None:
    """Exchanges imports, in place, while one node receives more than any node sends: some other node imports one more of
    that node's experts and gives up the import that it wants least."""
    nodes = len(crossing)
    for _ in range(4 * nodes):
        leaving, entering = node_traffic(imports, crossing, owner_node)
        flooded = int(entering.argmax())
        if entering[flooded] <= leaving.max():
            return
        swaps = []
        for node in range(nodes):
            candidates = np.flatnonzero(~imports[node] & (owner_node == flooded) & (crossing[node] > 0))
            given_up = np.flatnonzero(imports[node] & (owner_node != flooded))
            if candidates.size and given_up.size:
                add = candidates[crossing[node, candidates].argmax()]
                drop = given_up[crossing[node, given_up].argmin()]
                gain, loss = crossing[node, add], crossing[node, drop]
                leaves, enters = leaving.copy(), entering.copy()
                leaves[node] += loss - gain
                enters[flooded] -= gain
                enters[owner_node[drop]] += loss
                swaps.append((max(leaves.max(), enters.max()), node, add, drop))
        if not swaps or min(swaps)[0] >= entering[flooded]:
            return
        _, node, add, drop = min(swaps)
        imports[node, add], imports[node, drop] = True, False


class Spread:
    """Level 2: which rank of a node computes which tokens, as copies are added one after the other.

    demand: [N, E] int64; imports: [N, E] bool. At first every owner computes its experts, and imports, heaviest first, are
    at the least loaded rank of their node. Every further copy relieves one rank or fills another, so that a node makes
    about as many as it has ranks. (Filling ranks one after the other, without regard to owners, takes a copy for nearly
    every expert.)

    quota: [E, R] tokens; loads, free: [R] tokens and unused slots; copies: (expert, rank) in the order they were added.
    """

    def __init__(self, demand: Integers, owner: Integers, imports: Booleans, cluster: Cluster, extra_slots: int) -> None:
        experts, ranks = owner.size, cluster.num_ranks
        owner_node = cluster.node[owner]
        self.cluster = cluster
        self.copies: list[tuple[int, int]] = []
        self.held = owner[:, None] == np.arange(ranks)
        self.free = np.full(ranks, extra_slots)
        present = imports | (owner_node == np.arange(cluster.num_nodes)[:, None])
        at_owner = np.where(present, 0, demand).sum(axis=0) + demand[owner_node, np.arange(experts)]
        self.quota = np.where(self.held, at_owner[:, None], 0)
        self.loads = self.quota.sum(axis=0)
        for node, members in enumerate(cluster.members):
            imported = np.flatnonzero(imports[node])
            for expert in imported[np.argsort(-demand[node, imported], kind="stable")].tolist():
                with_room = members[self.free[members] > 0]
                rank = int(with_room[self.loads[with_room].argmin()])
                self.add_copy(expert, rank)
                self.quota[expert, rank] = demand[node, expert]
                self.loads[rank] += demand[node, expert]
        sizes = cluster.membership.sum(axis=1)
        self.target = (-(-(cluster.membership @ self.loads) // sizes))[cluster.node]  # [R] the node's mean load, rounded up
        self.beyond_relief = np.zeros(ranks, dtype=bool)

    def add_copy(self, expert: int, rank: int) -> None:
        self.held[expert, rank] = True
        self.free[rank] -= 1
        self.copies.append((expert, rank))

    def relieve_one(self) -> bool:
        """Moves tokens of the busiest rank that can be relieved to another one of its node; whether there was one."""
        while True:
            relievable = np.where((self.loads > self.target) & ~self.beyond_relief, self.loads, -1)
            busy = int(relievable.argmax())
            if relievable[busy] < 0:
                return False
            idle = self.cluster.members[self.cluster.node[busy]]
            idle = idle[self.loads[idle] < self.target[idle]]
            if self.use_copy(busy, idle) or self.make_copy(busy, idle[self.free[idle] > 0]):
                return True
            self.beyond_relief[busy] = True

    def use_copy(self, busy: int, idle: Integers) -> bool:
        """Tokens of an expert of which one of the ``idle`` ranks has a copy already."""
        shared = np.where(self.held[:, idle], self.quota[:, busy, None], 0)  # [E, idle]
        if not shared.any():
            return False
        expert, place = np.unravel_index(shared.argmax(), shared.shape)
        self.move(int(expert), busy, int(idle[place]))
        return True

    def make_copy(self, busy: int, idle: Integers) -> bool:
        """Tokens of the hottest expert to the least loaded of the ``idle`` ranks."""
        if not idle.size:
            return False
        rank = int(idle[self.loads[idle].argmin()])
        expert = int(self.quota[:, busy].argmax())
        self.add_copy(expert, rank)
        self.move(expert, busy, rank)
        return True

    def move(self, expert: int, busy: int, idle: int) -> None:
        amount = min(self.quota[expert, busy], self.loads[busy] - self.target[busy], self.target[idle] - self.loads[idle])
        self.quota[expert, busy] -= amount
        self.quota[expert, idle] += amount
        self.loads[busy] -= amount
        self.loads[idle] += amount
