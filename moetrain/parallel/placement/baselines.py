"""Placement rules of other systems, to compare with: FasterMoE's shadowing and DeepSeek's load balancer EPLB.

FasterMoE (PPoPP 2022; its latency model) copies hot experts to all ranks, after the gate and all or nothing. EPLB (MIT
licence) fills a fixed number of slots per rank with replicas, balanced for loads of the past and kept for many steps.

Letters: E experts, R ranks, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moetrain.parallel.placement.plan import Booleans, Cluster, Integers, PlacementPlan


def shadowed_experts(loads: Integers, token_seconds: float, expert_seconds: float) -> Booleans:
    """[E] bool, the experts that FasterMoE copies to all ranks.

    loads: [E] int64 tokens of all ranks. token_seconds: computation and all-to-alls of a step per token of the busiest
    expert that is not copied. expert_seconds: broadcast and reduction of one expert. From the hottest expert on, one more
    is copied while that shortens the modelled step; ties go to the lower id.
    """
    order = np.argsort(-loads, kind="stable")
    # busiest[n]: the largest load when the n hottest experts are copied
    busiest = np.append(loads[order], 0)
    seconds = token_seconds * busiest + expert_seconds * np.arange(len(busiest))
    worse = np.flatnonzero(seconds[1:] >= seconds[:-1])
    copied = int(worse[0]) if worse.size else len(loads)
    return np.isin(np.arange(len(loads)), order[:copied])


def eplb_slots(loads: Integers, num_replicas: int, *, num_groups: int, num_nodes: int, num_ranks: int) -> Integers:
    """[num_replicas] int64, the expert in each slot, slots listed rank by rank and ranks node by node.

    loads: [E] int64. If nodes divide the groups of neighbouring experts, each group stays within a node; otherwise
    nodes do not matter. A rank may get several replicas of an expert.

    Raises ValueError if the replicas are fewer than the experts or cannot be shared out equally.
    """
    experts = len(loads)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    if num_replicas < experts or num_replicas % num_ranks or num_ranks % num_nodes or experts % num_groups:
        raise ValueError(
            f"{num_replicas} replicas of {experts} experts in {num_groups} groups cannot fill {num_ranks} ranks on {num_nodes} nodes "
            "equally"
        )
    groups = np.arange(experts).reshape(num_groups, -1)
    slots: list[int] = []
    for members in pack(loads[groups].sum(axis=1).tolist(), num_nodes):
        of_node = groups[members].reshape(-1)
        replicas = replicate(loads[of_node].tolist(), num_replicas // num_nodes)
        copies = np.bincount(replicas)
        for on_rank in pack((loads[of_node] / copies)[replicas].tolist(), num_ranks // num_nodes):
            slots += of_node[[replicas[item] for item in on_rank]].tolist()
    return np.array(slots, dtype=np.int64)


def replicate(loads: Sequence[int], num_replicas: int) -> list[int]:
    """The item behind each replica: one of each, then one more of the item with the largest load per replica."""
    replicas = list(range(len(loads)))
    copies = np.ones(len(loads), dtype=np.int64)
    for _ in range(num_replicas - len(loads)):
        hottest = int((np.asarray(loads) / copies).argmax())
        replicas.append(hottest)
        copies[hottest] += 1
    return replicas


def pack(loads: Sequence[float], num_packs: int) -> list[list[int]]:
    """Items in packs of equal size: heaviest first, each into the lightest pack with room."""
    size = len(loads) // num_packs
    if size == 1:
        return [[item] for item in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    weight = [0.0] * num_packs
    for item in sorted(range(len(loads)), key=lambda item: -loads[item]):
        lightest = min((p for p in range(num_packs) if len(packs[p]) < size), key=weight.__getitem__)
        packs[lightest].append(item)
        weight[lightest] += loads[item]
    return packs


def eplb(loads: Integers, owner: Integers, cluster: Cluster, extra_slots: int, *, num_groups: int = 1) -> PlacementPlan:
    """EPLB's replicas as a placement.

    loads: [E] int64. owner: [E] int64. Ranks have slots for their share of the experts and ``extra_slots`` more. An owner
    that gets no replica hands its expert to the holder that owns the fewest experts.
    """
    ranks, experts = cluster.num_ranks, len(loads)
    per_rank = -(-experts // ranks) + extra_slots
    slots = eplb_slots(loads, ranks * per_rank, num_groups=num_groups, num_nodes=cluster.num_nodes, num_ranks=ranks)
    holders = np.zeros((experts, ranks), dtype=bool)
    # ranks of a cluster need not be numbered node by node
    holders[slots, np.repeat(np.concatenate(cluster.members), per_rank)] = True
    stays = holders[np.arange(experts), owner]
    owned = np.bincount(owner[stays], minlength=ranks)
    new_owner = owner.copy()
    for expert in np.flatnonzero(~stays):
        candidates = np.flatnonzero(holders[expert])
        new_owner[expert] = candidates[owned[candidates].argmin()]
        owned[new_owner[expert]] += 1
    return PlacementPlan(new_owner, holders)


def split_equally(counts: Integers, plan: PlacementPlan, cluster: Cluster) -> Integers:
    """Equal parts to all holders, near or far, which is what EPLB balances.

    counts: [S, E] int64. Returns X [S, E, R] int64; of n tokens over k holders each gets floor(n / k), and holder j one
    more when (j - source) mod k < n mod k.
    """
    k = plan.holders.sum(axis=1, keepdims=True)
    share, remainder = np.divmod(counts[:, :, None], k)
    place = plan.holders.cumsum(axis=1) - 1 - np.arange(len(counts))[:, None, None]
    return (share + (place % k < remainder)) * plan.holders
