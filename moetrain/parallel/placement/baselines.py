"""Placements of other systems, to compare with: FasterMoE's shadowed experts and DeepSeek's EPLB.

Written from descriptions of their algorithms. Letters: L layers, E experts, R ranks, P physical slots of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetrain.parallel.placement.plan import Booleans, Integers, PlacementPlan

Floats = NDArray[np.float32]


def fastermoe_shadow(
    counts: Integers, hidden_size: int, expansion: float, bandwidth: float, flops: float, value_bytes: int = 4
) -> Booleans:
    """[E] bool: the experts that FasterMoE (PPoPP 2022) copies to every rank, its shadows.

    Experts in descending order of their tokens are shadowed while the modelled latency falls: four all-to-alls and three
    GEMM passes for the hottest expert that is left, and for every shadow a broadcast and a reduction of its two matrices.

    counts: [R, E] int64. expansion: width of an expert over ``hidden_size``. bandwidth: bytes/s; flops: FLOP/s.
    """
    loads = counts.sum(axis=0)
    order = np.argsort(-loads, kind="stable")
    matrices = 2 * expansion * hidden_size**2  # parameters of one expert
    per_token = 3 * 2 * matrices / flops + 4 * hidden_size * value_bytes / bandwidth
    hottest_left = np.append(loads[order], 0)
    latency = per_token * hottest_left + np.arange(order.size + 1) * (matrices * value_bytes / bandwidth)
    rises = np.flatnonzero(np.diff(latency) >= 0)
    shadows = np.zeros(order.size, dtype=bool)
    shadows[order[: rises[0] if rises.size else order.size]] = True
    return shadows


@dataclass(frozen=True, eq=False)
class ReplicaPlacement:
    """Replicas of experts in physical slots; the slots of rank r are r P / R and the following ones.

    logical: [L, P] int64 expert of each slot. slots: [L, E, most replicas] int64 slots of each expert, ascending, then -1.
    replicas: [L, E] int64 number of slots of each expert.
    """

    logical: Integers
    slots: Integers
    replicas: Integers

    def rank_loads(self, loads: Integers, ranks: int) -> Floats:
        """[L, R] float32 tokens per rank if every expert ([L, E] ``loads``) serves its tokens in equal parts."""
        per_slot = np.take_along_axis(loads.astype(np.float32) / self.replicas.astype(np.float32), self.logical, axis=1)
        return per_slot.reshape(len(loads), ranks, -1).sum(axis=2)

    def plan(self, layer: int, ranks: int) -> PlacementPlan:
        """The placement of one layer; the rank of an expert's first slot owns it."""
        slots_per_rank = self.logical.shape[1] // ranks
        holders = np.zeros((self.replicas.shape[1], ranks), dtype=bool)
        holders[self.logical[layer], np.arange(self.logical.shape[1]) // slots_per_rank] = True
        return PlacementPlan(self.slots[layer, :, 0] // slots_per_rank, holders)


def eplb(loads: Integers, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> ReplicaPlacement:
    """DeepSeek's expert-parallel load balancer: replicas for hot experts, packed onto GPUs of equal slot counts.

    If nodes divide the groups, hierarchically: groups of experts to nodes, replicas inside each node, replicas to the node's
    GPUs. Otherwise all GPUs form one node and all experts one group. loads: [L, E] int64.

    Raises ValueError if the numbers do not divide each other, or there are fewer replicas than experts.
    """
    experts = loads.shape[1]
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    quantities = {"experts": (experts, num_groups), "groups": (num_groups, num_nodes)}
    quantities |= {"replicas": (num_replicas, num_gpus), "GPUs": (num_gpus, num_nodes)}
    for what, (number, parts) in quantities.items():
        if number % parts:
            raise ValueError(f"{number} {what} cannot be divided equally by {parts}")
    if num_replicas < experts:
        raise ValueError(f"{num_replicas} replicas are too few for {experts} experts")
    logical = np.stack([eplb_layer(layer, num_replicas, num_groups, num_nodes, num_gpus) for layer in loads.astype(np.float32)])
    replicas = np.stack([np.bincount(layer, minlength=experts) for layer in logical])
    slots = np.full((*loads.shape, replicas.max()), -1, dtype=np.int64)
    for layer, expert in np.ndindex(*loads.shape):
        slots[layer, expert, : replicas[layer, expert]] = np.flatnonzero(logical[layer] == expert)
    return ReplicaPlacement(logical, slots, replicas)


def eplb_layer(loads: Floats, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Integers:
    """[P] the expert of each slot; loads: [E] float32."""
    by_group = np.arange(loads.size).reshape(num_groups, -1)
    slots = []
    for groups in pack(loads[by_group].sum(axis=1), num_nodes):
        experts = by_group[groups].reshape(-1)
        replica_of, count = replicate(loads[experts], num_replicas // num_nodes)
        per_replica = (loads[experts] / count).astype(np.float32)
        slots += [experts[replica_of[gpu]] for gpu in pack(per_replica[replica_of], num_gpus // num_nodes)]
    return np.concatenate(slots)


def pack(loads: Floats, packs: int) -> list[Integers]:
    """Equally many items for each of ``packs``: in descending order of load, each to the lightest pack with room. One item
    each: the items in their order."""
    room = loads.size // packs
    if room == 1:
        return list(np.arange(loads.size)[:, None])
    filled: list[list[int]] = [[] for _ in range(packs)]
    weight = np.zeros(packs, dtype=np.float32)
    for item in np.argsort(-loads, kind="stable").tolist():
        lightest = min((pack for pack in range(packs) if len(filled[pack]) < room), key=weight.__getitem__)
        filled[lightest].append(item)
        weight[lightest] += loads[item]
    return [np.array(items, dtype=np.int64) for items in filled]


def replicate(loads: Floats, num_replicas: int) -> tuple[Integers, Integers]:
    """One replica of every item, then one more each time of the item with the largest load per replica.

    Returns the item of each replica, [num_replicas], and the replicas of each item.
    """
    items = list(range(loads.size))
    count = np.ones(loads.size, dtype=np.int64)
    while len(items) < num_replicas:
        items.append(int((loads / count.astype(np.float32)).argmax()))
        count[items[-1]] += 1
    return np.array(items, dtype=np.int64), count
