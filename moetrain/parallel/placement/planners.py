"""Planners: loads in, placements out.

``owners_only`` is expert parallelism and ``everywhere`` ZeRO-3; between them lie Hecate's two algorithms (arXiv
2502.02581): sparse materialisation chooses the copies of a step, heterogeneous sharding the owners for many steps.
What the paper leaves open (how slots are shared out, ties) is fixed here: ties go to the lower id.

Letters: L layers, E experts, R ranks, N nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np

from moetrain.parallel.placement.cost import LayerCost, gather_traffic, layer_time
from moetrain.parallel.placement.dispatch import split_even
from moetrain.parallel.placement.plan import Booleans, Cluster, Integers, PlacementPlan

SlotRule = Literal["proportional", "greedy"]


def even_sharding(num_experts: int, ranks: int) -> Integers:
    """[E] owners: neighbouring experts together, as evenly as possible; fewer experts than ranks spread over all ranks, and
    so over the nodes."""
    return np.arange(num_experts, dtype=np.int64) * ranks // num_experts


def owners_only(owner: Integers, ranks: int) -> PlacementPlan:
    """No copies: expert parallelism. owner: [E] int64."""
    return PlacementPlan.owners_only(owner, ranks)


def everywhere(owner: Integers, ranks: int) -> PlacementPlan:
    """All experts on all ranks: ZeRO-3. owner: [E] int64."""
    return PlacementPlan.replicated(owner, np.ones(len(owner), dtype=bool), ranks)


def sparse_materialization(
    loads: Integers, owner: Integers, cluster: Cluster, overlap_degree: int, extra_slots: int, rule: SlotRule = "proportional"
) -> PlacementPlan:
    """Copies of the hottest experts (Hecate, Algorithm 1).

    loads: [E] int64, predicted tokens. owner: [E] int64. At most ``overlap_degree`` experts are copied, as many as can be
    gathered behind the work before the layer, with at most ``extra_slots`` copies on a rank. If a rank has room for all of
    them, every rank gets all; otherwise ``rule`` shares the slots out: in proportion to the loads, or one after the other to
    the expert with the most tokens per holder.

    Raises ValueError for an unknown rule.
    """
    experts, ranks = len(loads), cluster.num_ranks
    top = hottest(loads, min(overlap_degree, experts))
    extra_slots = min(extra_slots, top.size)
    if top.size <= extra_slots:
        return PlacementPlan.replicated(owner, np.isin(np.arange(experts), top), ranks)
    wanted = share_slots(loads[top].tolist(), ranks * extra_slots, ranks - 1, rule)
    plan = PlacementPlan.owners_only(owner, ranks)
    place_copies(plan.holders, top.tolist(), wanted, np.full(ranks, extra_slots), cluster)
    return plan


def hottest(loads: Integers, number: int) -> Integers:
    """Ids of the experts with the largest loads, in descending order."""
    return np.argsort(-loads, kind="stable")[:number]


def share_slots(loads: list[int], slots: int, most: int, rule: SlotRule) -> list[int]:
    """How many copies each of the experts with these descending loads is to get out of ``slots``, at most ``most`` each."""
    if rule == "proportional":
        wanted, load_left = [], sum(loads)
        for load in loads:
            wanted.append(min(most, slots * load // load_left) if load_left else 0)
            slots -= wanted[-1]
            load_left -= load
        return wanted
    if rule != "greedy":
        raise ValueError(f"rule {rule!r} is none of proportional, greedy")
    wanted = [0] * len(loads)
    for _ in range(slots):
        open_to_more = [expert for expert, copies in enumerate(wanted) if copies < most and loads[expert]]
        if not open_to_more:
            break
        # the fractions load / holders, compared without division
        best = open_to_more[0]
        for expert in open_to_more[1:]:
            if loads[expert] * (1 + wanted[best]) > loads[best] * (1 + wanted[expert]):
                best = expert
        wanted[best] += 1
    return wanted


def place_copies(holders: Booleans, experts: list[int], wanted: list[int], free: Integers, cluster: Cluster) -> None:
    """Adds copies to ``holders`` [E, R] while ranks have ``free`` [R] slots: first in nodes without a holder, then where
    more slots are free."""
    for expert, copies in zip(experts, wanted, strict=True):
        for _ in range(copies):
            open_slots = np.where(holders[expert], 0, free)
            in_node = cluster.membership @ open_slots
            if not in_node.any():
                break
            reached = cluster.membership @ holders[expert] > 0
            node = np.lexsort((-in_node, reached, in_node == 0))[0]
            members = cluster.members[node]
            rank = members[open_slots[members].argmax()]
            holders[expert, rank] = True
            free[rank] -= 1


def heterogeneous_sharding(loads: Integers, cluster: Cluster, overlap_degree: int, current: Integers | None = None) -> Integers:
    """New owners, for all layers at once, that balance what copies will not balance (Hecate, Algorithm 2).

    loads: [L, E] int64, predicted tokens. The ``overlap_degree`` hottest experts of every layer are set aside, since they
    will be copied. The others go, heaviest first, to the node and rank with the least load of their layer; a rank may own
    any number of experts of a layer, but over all layers ranks own equally many (the first L E mod R one more).

    current: [L, E] owners until now. With it, and beyond the paper, experts that were set aside stay where they are if
    slots are left there; every expert that moves takes its optimizer state along.

    Returns [L, E] int64.
    """
    layers, experts = loads.shape
    ranks = cluster.num_ranks
    slots = [layers * experts // ranks + (rank < layers * experts % ranks) for rank in range(ranks)]
    members = [ids.tolist() for ids in cluster.members]
    order = [hottest(loads[layer], experts).tolist() for layer in range(layers)]
    top = [ids[:overlap_degree] for ids in order]
    rest = [ids[overlap_degree:] for ids in order]
    owners = np.full((layers, experts), -1, dtype=np.int64)

    def assign(layer: int, expert: int, rank: int) -> None:
        owners[layer, expert] = rank
        slots[rank] -= 1

    heaviest_first = sorted((layer for layer in range(layers) if rest[layer]), key=lambda layer: -loads[layer, rest[layer][0]])
    for layer in heaviest_first:
        rank_load, node_load = [0] * ranks, [0] * len(members)
        for expert in rest[layer]:
            node_slots = [sum(slots[rank] for rank in ids) for ids in members]
            node = min((v for v in range(len(members)) if node_slots[v]), key=lambda v: (node_load[v], node_slots[v]))
            rank = min((r for r in members[node] if slots[r]), key=lambda r: (rank_load[r], slots[r]))
            assign(layer, expert, rank)
            load = int(loads[layer, expert])
            node_load[node] += load
            rank_load[rank] += load

    if current is not None:
        for layer in range(layers):
            for expert in top[layer]:
                if slots[current[layer, expert]]:
                    assign(layer, expert, int(current[layer, expert]))
    for layer in range(layers):
        for expert in top[layer]:
            if owners[layer, expert] < 0:
                assign(layer, expert, max(range(ranks), key=slots.__getitem__))
    return owners


def calibrate(
    counts: Integers,
    plan: PlacementPlan,
    cluster: Cluster,
    cost: LayerCost,
    overlap_degree: int,
    extra_slots: int,
    split: Callable[[Integers, PlacementPlan, Cluster], Integers] = split_even,
) -> PlacementPlan:
    """More copies once the true counts are known, if the modelled time falls although their transfer is fully exposed
    (Hecate, section 4.4).

    counts: [R, E] int64 after the gate. The hottest experts get copies on ranks with unused slots of the
    ``extra_slots``, in proportion to their loads. Returns ``plan`` itself if that does not pay.
    """
    loads = counts.sum(axis=0)
    free = extra_slots - plan.copies.sum(axis=0)
    top = hottest(loads, min(overlap_degree, len(loads)))
    holders = plan.holders.copy()
    wanted = share_slots(loads[top].tolist(), int(free.sum()), cluster.num_ranks - 1, "proportional")
    place_copies(holders, top.tolist(), wanted, free, cluster)
    more = replace(plan, holders=holders)
    late = replace(plan, holders=holders & ~plan.copies)
    before, after = (layer_time(split(counts, choice, cluster), choice, cluster, cost) for choice in (plan, more))
    exposed_copies = gather_traffic(late, cluster, "two_stage").time(cluster, cost.expert_bytes)
    # what was planned is gathered ahead as before; only the additional copies wait for the gate
    forward = cost.exposed_forward(before.gather) + exposed_copies - cost.exposed_forward(after.gather)
    return more if after.total + forward < before.total else plan
