"""The two-level planner: first which experts every node imports, then which ranks of a node compute them.

Beyond Hecate (arXiv 2502.02581), whose algorithm copies the hottest experts everywhere. Level 1 weighs, between nodes,
the tokens that no longer travel against the experts that do. Only the node with most transfers is paid for, so nodes get
equal budgets; within one the imports that save most tokens come first. Level 2 spreads, inside
nodes, what the busiest rank has too much, as long as the modelled time falls.

Letters: E experts, R ranks, N nodes. Modelled times are compared as integer nanoseconds; ranks agree on a plan if they
share the counts, the cluster and the cost (measured times have to be shared first).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from moetrain.parallel.placement.cost import LayerCost
from moetrain.parallel.placement.plan import Booleans, Cluster, Integers, PlacementPlan

CANDIDATES = 2
"""Sets of imports that are improved by exchanges and compared."""

IMPOSSIBLE = np.iinfo(np.int64).max
"""Time of an exchange that cannot be made."""


def two_level(counts: Integers, owner: Integers, cluster: Cluster, cost: LayerCost, extra_slots: int) -> PlacementPlan:
    """Copies that balance nodes and ranks, with at most ``extra_slots`` on a rank; to be used with ``split_quota``.

    counts: [N, E] or [R, E] int64, predicted tokens of each node or rank for each expert. owner: [E] int64. As long as other
    work hides the copies' transfers and slots suffice, the predicted loads inside a node differ from their mean by less than
    a token; beyond that, copies are made only if the modelled time of the layer falls.

    Raises ValueError if the counts have another shape.
    """
    plan = PlacementPlan.owners_only(owner, cluster.num_ranks)
    nodes, ranks, experts = cluster.num_nodes, cluster.num_ranks, plan.num_experts
    if counts.shape not in ((nodes, experts), (ranks, experts)):
        raise ValueError(f"counts have shape {counts.shape}, expected ({nodes} or {ranks}, {experts})")
    demand = counts if len(counts) == nodes else cluster.membership @ counts
    owner_node = cluster.node[plan.owner]
    crossing = np.where(owner_node != np.arange(nodes)[:, None], demand, 0)

    imports = choose_imports(demand, owner_node, cluster, cost, extra_slots)
    spread = Spread(demand, plan.owner, imports, cluster, extra_slots)
    while spread.relieve_one():
        pass
    num_copies, most_copies, load = np.array(spread.steps).T
    travelling, transfers = np.where(imports, 0, crossing), busiest_node(imports, owner_node)
    times = modelled_time(cluster, cost, tokens=busiest_node(travelling, owner_node), transfers=transfers, copies=most_copies, load=load)
    # of equally good ones the last: copies that cost nothing may be of use if the loads turn out otherwise
    best = len(times) - 1 - int(times[::-1].argmin())

    without = Spread(demand, plan.owner, np.zeros_like(imports), cluster, 0)
    if times[best] < modelled_time(cluster, cost, tokens=busiest_node(crossing, owner_node), load=without.loads.max()):
        for expert, rank in spread.copies[: num_copies[best]]:
            plan.holders[expert, rank] = True
    return plan


def modelled_time(
    cluster: Cluster,
    cost: LayerCost,
    *,
    tokens: Integers | int,
    transfers: Integers | int = 0,
    copies: Integers | int = 0,
    load: Integers | int = 0,
) -> Integers:
    """Nanoseconds, int64, of one layer's forward and backward, as far as they depend on the placement.

    tokens, transfers: tokens and experts that the busiest node sends or receives; copies: experts that the busiest rank
    receives; load: tokens that the busiest rank computes. Scalars or arrays of one shape.
    """

    def transfer(size: int) -> np.ndarray:
        seconds = np.maximum(transfers * (size / cluster.inter_bandwidth), copies * (size / cluster.intra_bandwidth))
        return np.where(seconds > 0, seconds + cluster.latency, 0)

    gather, reduce = transfer(cost.expert_bytes), transfer(cost.gradient_bytes)
    forward = np.maximum(gather - cost.hidden_forward, 0)
    backward = np.maximum(reduce + gather * cost.rematerialize - cost.hidden_backward, 0)
    all_to_all = tokens * (cost.token_bytes / cluster.inter_bandwidth)
    compute = load * (cost.flops_per_token / cluster.flops)
    return np.rint(1e9 * (4 * all_to_all + 3 * compute + forward + backward)).astype(np.int64)


def choose_imports(demand: Integers, owner_node: Integers, cluster: Cluster, cost: LayerCost, extra_slots: int) -> Booleans:
    """Level 1: [N, E] bool, the experts of other nodes that each node is to have a copy of.

    demand: [N, E] int64 tokens of each node for each expert. owner_node: [E] int64. For every budget, the most experts that a
    node may import and export, pairs of node and expert are taken in descending order of their tokens while both nodes have
    budget left. The best set is then improved by exchanges of single imports.
    """
    nodes, experts = demand.shape
    crossing = np.where(owner_node == np.arange(nodes)[:, None], 0, demand)
    ends = crossing.sum(axis=1, keepdims=True) + sums(owner_node, crossing.sum(axis=0), nodes)[owner_node]
    order = np.argsort(-crossing * ends, axis=None, kind="stable")[: np.count_nonzero(crossing)]
    importer, expert = np.divmod(order, experts)
    exporter, tokens = owner_node[expert], crossing[importer, expert]

    budget = np.arange(busiest_node(crossing > 0, owner_node) + 1)
    ranks = cluster.membership.sum(axis=1, keepdims=True)
    slots = ranks * extra_slots
    can_import, can_export = np.minimum(budget, slots), np.tile(budget, (nodes, 1))  # [N, budgets], what is left
    taken = np.zeros((order.size, budget.size), dtype=bool)
    for row, node, owners_node in zip(taken, importer.tolist(), exporter.tolist(), strict=True):
        np.greater(np.minimum(can_import[node], can_export[owners_node]), 0, out=row)
        can_import[node] -= row
        can_export[owners_node] -= row

    def time(leaving: Integers, entering: Integers, imported: Integers, exported: Integers) -> Integers:
        """Of sets of imports, from the tokens that still leave and enter nodes and the experts that do, all [N, sets]."""
        load = (demand.sum(axis=1, keepdims=True) - leaving + entering) / ranks
        most = [np.maximum(out, into).max(axis=0) for out, into in ((leaving, entering), (exported, imported))]
        return modelled_time(cluster, cost, tokens=most[0], transfers=most[1], load=load.max(axis=0))

    left = np.where(taken, 0, tokens[:, None])
    traffic = [sums(group, values, nodes) for values in (left, taken) for group in (importer, exporter)]
    candidates = []
    for place in np.argsort(time(*traffic), kind="stable")[:CANDIDATES]:
        imports = np.zeros(crossing.shape, dtype=bool)
        imports[importer[taken[:, place]], expert[taken[:, place]]] = True
        duration = exchange_imports(imports, crossing, owner_node, slots[:, 0], [part[:, [place]] for part in traffic], time)
        candidates.append((duration, imports))
    return min(candidates, key=lambda candidate: candidate[0])[1]


def exchange_imports(
    imports: Booleans,
    crossing: Integers,
    owner_node: Integers,
    slots: Integers,
    traffic: list[Integers],
    time: Callable[..., Integers],
) -> int:
    """Changes ``imports`` [N, E] in place, by the best of ``exchanges`` each time, as long as ``time(*traffic)`` falls.

    A node that imports one more expert of another node takes the one that it wants most, and gives up the one that it wants
    least. slots: [N] most imports of each node. Returns the time that was reached, in nanoseconds.
    """
    nodes, experts = crossing.shape
    moves = exchanges(nodes)
    done = moves < nodes * nodes
    node, other = np.divmod(np.where(done, moves, 0), nodes)
    column = np.arange(moves.shape[1])
    theirs = (owner_node == np.arange(nodes)[:, None]) & (crossing > 0)[:, None]  # [importer, exporter, E]
    reached = int(time(*traffic)[0])
    for _ in range(nodes):
        held = imports[:, None]
        wanted = np.where(theirs & ~held, crossing[:, None], -1).reshape(-1, experts)
        unwanted = np.where(theirs & held, -crossing[:, None], 1).reshape(-1, experts)
        unwanted = np.where(unwanted > 0, -IMPOSSIBLE, unwanted)
        best_expert = wanted.argmax(axis=1), unwanted.argmax(axis=1)
        saved = [np.append(of.max(axis=1), 0)[move] for of, move in zip((wanted, unwanted), moves, strict=True)]
        possible = (saved[0] >= 0) & (saved[1] > -IMPOSSIBLE)

        changed = [np.repeat(part, column.size, axis=1) for part in traffic]
        for step, sign in enumerate((1, -1)):
            tokens = np.where(possible, saved[step], 0)
            for part, place, amount in zip(changed, (node, other) * 2, (-tokens, -tokens, *(sign * done[step],) * 2), strict=True):
                part[place[step], column] += amount
        possible &= (changed[2] <= slots[:, None]).all(axis=0)
        times = np.where(possible, time(*changed), IMPOSSIBLE)
        best = int(times.argmin())
        if times[best] >= reached:
            break
        reached, traffic = int(times[best]), [part[:, [best]] for part in changed]
        for step in (0, 1):
            if done[step, best]:
                imports[node[step, best], best_expert[step][moves[step, best]]] = step == 0
    return reached


@cache
def exchanges(nodes: int) -> Integers:
    """[2, moves]: what is imported and what is given up in each, as importer N + exporter, or N N for nothing.

    One import more or less; one for another of the same importer; or one that another node gives up to the same exporter.
    """
    nothing = nodes * nodes
    a, b, c = np.indices((nodes,) * 3).reshape(3, -1)
    one, none = a * nodes + b, np.full_like(a, nothing)
    moves = [(one, none), (none, one), (one, a * nodes + c), (one, c * nodes + b)]
    return np.unique(np.concatenate([np.stack(move) for move in moves], axis=1), axis=1)


def sums(group: Integers, values: np.ndarray, groups: int) -> Integers:
    """[groups, ...] sums of the rows of ``values`` in each group."""
    return (group == np.arange(groups)[:, None]).astype(np.int64) @ values


def busiest_node(matrix: np.ndarray, owner_node: Integers) -> int:
    """The largest sum over a row of ``matrix`` [N, E], or over the columns of the experts of one node: what the node with
    most receives or sends."""
    return int(max(matrix.sum(axis=1).max(), sums(owner_node, matrix.sum(axis=0), len(matrix)).max()))


class Spread:
    """Level 2: which rank of a node computes which tokens, as copies are added one after the other.

    demand: [N, E] int64; imports: [N, E] bool. At first every owner computes its experts, and imports, heaviest first, are
    at the least loaded rank of their node. Every further copy relieves one rank or fills another, so that a node makes
    about as many as it has ranks. (Filling ranks one after the other, without regard to owners, takes a copy for nearly
    every expert.)

    quota: [E, R] tokens; loads, free: [R] tokens and unused slots; copies: (expert, rank) in the order of their making;
    steps: number of copies, copies of the rank with most, tokens of the busiest rank, at first and after every move.
    """

    def __init__(self, demand: Integers, owner: Integers, imports: Booleans, cluster: Cluster, extra_slots: int) -> None:
        experts, ranks = owner.size, cluster.num_ranks
        owner_node = cluster.node[owner]
        present = imports | (owner_node == np.arange(cluster.num_nodes)[:, None])
        at_owner = np.where(present, 0, demand).sum(axis=0) + demand[owner_node, np.arange(experts)]
        self.cluster, self.extra_slots = cluster, extra_slots
        self.held = owner[:, None] == np.arange(ranks)
        self.quota = np.where(self.held, at_owner[:, None], 0)
        self.loads = self.quota.sum(axis=0)
        self.free = np.full(ranks, extra_slots)
        self.copies: list[tuple[int, int]] = []
        for node, members in enumerate(cluster.members):
            imported = np.flatnonzero(imports[node])
            for expert in imported[np.argsort(-demand[node, imported], kind="stable")].tolist():
                with_room = members[self.free[members] > 0]
                rank = int(with_room[self.loads[with_room].argmin()])
                self.add_copy(expert, rank)
                self.quota[expert, rank] = demand[node, expert]
                self.loads[rank] += demand[node, expert]
        self.steps: list[tuple[int, int, int]] = []
        self.note_step()
        in_node = cluster.membership @ self.loads
        self.target = -(-in_node // cluster.membership.sum(axis=1))[cluster.node]  # [R] the node's mean, rounded up
        self.stuck = np.zeros(ranks, dtype=bool)

    def add_copy(self, expert: int, rank: int) -> None:
        self.held[expert, rank] = True
        self.free[rank] -= 1
        self.copies.append((expert, rank))

    def note_step(self) -> None:
        self.steps.append((len(self.copies), self.extra_slots - int(self.free.min()), int(self.loads.max())))

    def relieve_one(self) -> bool:
        """Moves tokens from the busiest rank that can be relieved to another one of its node; False if there is none."""
        while True:
            relievable = np.where((self.loads > self.target) & ~self.stuck, self.loads, -1)
            busy = int(relievable.argmax())
            if relievable[busy] < 0:
                return False
            idle = self.cluster.members[self.cluster.node[busy]]
            idle = idle[self.loads[idle] < self.target[idle]]
            if self.use_copy(busy, idle) or self.make_copy(busy, idle[self.free[idle] > 0]):
                self.note_step()
                return True
            self.stuck[busy] = True

    def use_copy(self, busy: int, idle: Integers) -> bool:
        """Tokens of an expert of which one of the ``idle`` ranks has a copy already; False without such an expert."""
        shared = np.where(self.held[:, idle], self.quota[:, busy, None], 0)  # [E, idle]
        if not shared.any():
            return False
        expert, place = np.unravel_index(shared.argmax(), shared.shape)
        self.move(int(expert), busy, int(idle[place]))
        return True

    def make_copy(self, busy: int, idle: Integers) -> bool:
        """Tokens of the hottest expert to the least loaded of the ``idle`` ranks; False without such a rank."""
        if not idle.size:
            return False
        rank, expert = int(idle[self.loads[idle].argmin()]), int(self.quota[:, busy].argmax())
        self.add_copy(expert, rank)
        self.move(expert, busy, rank)
        return True

    def move(self, expert: int, busy: int, idle: int) -> None:
        amount = min(self.quota[expert, busy], self.loads[busy] - self.target[busy], self.target[idle] - self.loads[idle])
        self.quota[expert, busy] -= amount
        self.quota[expert, idle] += amount
        self.loads[busy] -= amount
        self.loads[idle] += amount
