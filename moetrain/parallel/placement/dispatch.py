"""Where the tokens of one MoE layer go when experts have several holders: from counts and a plan to ``X[s, e, d]``, the
tokens of expert e that rank s sends to rank d.

Two rules. ``split_even`` is Hecate's (arXiv 2502.02581, section 4.4): local copies, else copies in the node, else all
copies, in equal parts. ``split_quota`` goes beyond the paper: inside every node the busiest rank gets as few tokens as
the copies allow. Both need integers only, so every rank that knows the counts finds the same ``X``.

Letters: R ranks, S = R of them as sources, E experts, N nodes, G ranks of one node.
"""

from __future__ import annotations

import numpy as np

from moetrain.parallel.placement.plan import Booleans, Cluster, Integers, PlacementPlan


def split_even(counts: Integers, plan: PlacementPlan, cluster: Cluster) -> Integers:
    """Equal parts to the nearest holders: the source itself, else those in its node, else all.

    counts: [S, E] int64, tokens that each rank routes to each expert. Returns X [S, E, R] int64. Of n tokens over k
    candidates, in ascending order of ranks, each gets floor(n / k), and candidate j one more when
    (j - source) mod k < n mod k, so that the remainders of different sources spread over the candidates.
    """
    near = plan.holders & cluster.same_node[:, None, :]
    candidates = np.where(near.any(axis=2, keepdims=True), near, plan.holders)
    at_home = plan.holders.T
    candidates[at_home] = False
    source, expert = np.nonzero(at_home)
    candidates[source, expert, source] = True

    k = candidates.sum(axis=2, keepdims=True)
    share, remainder = np.divmod(counts[:, :, None], k)
    place = candidates.cumsum(axis=2) - 1 - np.arange(len(counts))[:, None, None]
    return (share + (place % k < remainder)) * candidates


def split_quota(counts: Integers, plan: PlacementPlan, cluster: Cluster) -> Integers:
    """The smallest possible maximum load inside each node.

    A node's tokens stay in the node if one of its ranks holds their expert, and go to the node of the expert's owner
    otherwise. Inside the node, the quota of each holder is chosen such that the largest load of a rank is minimal. Among
    such quotas the search starts from those that keep tokens on their rank, so little moves that need not move.

    counts: [S, E] int64. Returns X [S, E, R] int64 with ``X.sum(2) == counts``; ``X.sum(0)`` are the quotas, exactly.
    """
    if not plan.copies.any():
        return to_owners(counts, plan)
    copies = cluster.membership @ plan.holders.T  # [N, E] holders of each expert in each node
    home = np.where(copies[cluster.node] > 0, cluster.node[:, None], cluster.node[plan.owner])  # [S, E] node that computes
    return cut(counts, quotas(counts, home, copies, plan.holders, cluster), home, cluster)


def to_owners(counts: Integers, plan: PlacementPlan) -> Integers:
    """All tokens to the owner of their expert, [S, E, R]."""
    split = np.zeros((*counts.shape, plan.num_ranks), dtype=np.int64)
    split[:, np.arange(plan.num_experts), plan.owner] = counts
    return split


def quotas(counts: Integers, home: Integers, copies: Integers, holders: Booleans, cluster: Cluster) -> Integers:
    """[E, R] tokens of each expert that each rank is to compute; the arguments are explained in ``split_quota``."""
    quota = np.where(holders, counts.T, 0)
    for node, members in enumerate(cluster.members):
        demand = np.where(home == node, counts, 0).sum(axis=0)
        held, part = holders[:, members], quota[:, members]
        to_place = demand - part.sum(axis=1)
        single = copies[node] == 1
        part += np.where(single[:, None] & held, to_place[:, None], 0)
        shared = np.flatnonzero((copies[node] > 1) & (demand > 0))
        if shared.size:
            # the fewer holders, the less choice: these experts first
            shared = shared[np.lexsort((shared, copies[node][shared]))]
            loads = part.sum(axis=0)
            for expert in shared[to_place[shared] > 0].tolist():
                ranks = np.flatnonzero(held[expert])
                added = pour(int(to_place[expert]), loads[ranks].tolist())
                part[expert, ranks] += added
                loads[ranks] += added
            part[shared] = relieve(part[shared], held[shared], loads)
        quota[:, members] = part
    return quota


def pour(amount: int, levels: list[int]) -> list[int]:
    """What each of ``levels`` rises by when ``amount`` is poured over them; lower ones of equal levels get the remainder."""
    order = sorted(range(len(levels)), key=levels.__getitem__)
    total, width = amount, 0
    for index in order:
        if width and levels[index] * width >= total:
            break
        total += levels[index]
        width += 1
    level, remainder = divmod(total, width)
    added = [0] * len(levels)
    for place, index in enumerate(order[:width]):
        added[index] = level + (place < remainder) - levels[index]
    return added


def relieve(quota: Integers, held: Booleans, loads: Integers) -> Integers:
    """Moves tokens from the busiest rank, along chains of shared experts, until its load is minimal.

    quota: [experts, G] int64; held: [experts, G]; loads: [G] int64 of all experts, also those that are not listed. A
    rank whose reachable ranks all have at most one token less cannot be relieved: nothing that is computed there can be
    computed elsewhere.
    """
    quota, loads, held = quota.copy(), loads.copy(), held.astype(np.int64)
    target = -(-int(loads.sum()) // loads.size)
    movable = (quota.T @ held).tolist()  # [G, G] tokens on one rank that another could take
    while True:
        busiest = int(loads.argmax())
        if loads[busiest] <= target:
            return quota
        path = path_to_idle(movable, loads.tolist(), busiest, target)
        most, least = int(loads[path[0]]), int(loads[path[-1]])
        if most - least < 2:
            return quota
        level = target if least < target else (most + least + 1) // 2
        amount = min(most - level, level - least, *(movable[a][b] for a, b in zip(path, path[1:], strict=False)))
        for a, b in zip(path, path[1:], strict=False):
            available = quota[:, a] * held[:, b]
            moved = np.clip(amount - available.cumsum() + available, 0, available)
            quota[:, a] -= moved
            quota[:, b] += moved
        loads[path[0]] -= amount
        loads[path[-1]] += amount
        for rank in path:
            movable[rank] = (quota[:, rank] @ held).tolist()


def path_to_idle(movable: list[list[int]], loads: list[int], start: int, target: int) -> list[int]:
    """The shortest path over ranks that can take tokens to one with less than ``target``, if there is none to the least
    loaded; equal ones by lower index. Just ``[start]`` if nothing can move."""
    parent, frontier, end = {start: start}, [start], start
    while frontier and loads[end] >= target:
        found = []
        for rank in frontier:
            for other, tokens in enumerate(movable[rank]):
                if tokens and other not in parent:
                    parent[other] = rank
                    found.append(other)
        frontier = found
        end = min((end, *found), key=lambda rank: (loads[rank], rank))
    path = [end]
    while path[-1] != start:
        path.append(parent[path[-1]])
    return path[::-1]


def cut(counts: Integers, quota: Integers, home: Integers, cluster: Cluster) -> Integers:
    """X [S, E, R] with sources ``counts`` [S, E] and quotas [E, R], exactly: a rank keeps what it may, the rest meets as
    two rows of segments do: sources by the node that computes for them, holders by their node, both then by rank."""
    ranks = np.arange(cluster.num_ranks)
    kept = np.minimum(counts, quota.T)
    kept = np.where(home == cluster.node[:, None], kept, 0)
    sources, places = (counts - kept).T, quota - kept.T  # [E, S], [E, R]
    order = np.argsort(home.T * cluster.num_ranks + ranks, axis=1)
    by_node = np.argsort(cluster.node, kind="stable")
    source_end = np.empty_like(sources)
    np.put_along_axis(source_end, order, np.take_along_axis(sources, order, axis=1).cumsum(axis=1), axis=1)
    place_end = np.empty_like(places)
    place_end[:, by_node] = places[:, by_node].cumsum(axis=1)

    begin = np.maximum((source_end - sources).T[:, :, None], place_end - places)
    split = np.maximum(np.minimum(source_end.T[:, :, None], place_end) - begin, 0)
    split[ranks, :, ranks] += kept
    return split


def rank_loads(split: Integers) -> Integers:
    """[R] tokens that each rank computes under ``X`` [S, E, R]."""
    return split.sum(axis=(0, 1))


def node_matrix(split: Integers, cluster: Cluster) -> Integers:
    """[N, N] tokens that go from one node to another under ``X`` [S, E, R]; the diagonal stays inside its node."""
    return cluster.membership @ split.sum(axis=1) @ cluster.membership.T
