"""The ways of placing experts that are compared, each as a planner and the settings that training would run it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from moetrain.parallel.layouts import FSSDPSettings
from moetrain.parallel.layouts import Planner as PlannerName
from moetrain.parallel.placement.baselines import eplb, fastermoe_shadow
from moetrain.parallel.placement.cost import LayerCost
from moetrain.parallel.placement.dispatch import split_even, split_quota
from moetrain.parallel.placement.plan import Cluster, Integers, PlacementPlan
from moetrain.parallel.placement.planners import owners_only
from moetrain.parallel.placement.scheduler import Planner
from moetrain.parallel.scheduling import make_planner, overlap_degree

Split = Callable[[Integers, PlacementPlan, Cluster], Integers]
"""(counts [R, E], plan, cluster) -> [R, E, R] rows between ranks"""


@dataclass(frozen=True)
class Strategy:
    """settings: of the layout that is simulated. planner: makes the planner of a layer. split: rows over copies.

    after_gate: plans from true counts, so that no work hides the gathering of copies. sets_aside: heterogeneous sharding
    (with ``settings.reshard_every``) leaves out the experts that will be copied.
    """

    name: str
    settings: FSSDPSettings
    planner: Callable[[FSSDPSettings, Cluster, LayerCost], Planner] = make_planner
    split: Split = split_even
    after_gate: bool = False
    sets_aside: bool = True

    def adjust(self, cost: LayerCost) -> LayerCost:
        """A layer's cost under this strategy."""
        return replace(cost, hidden_forward=0.0) if self.after_gate else cost

    def set_aside(self, cluster: Cluster, cost: LayerCost) -> int:
        """Experts of a layer that heterogeneous sharding leaves out."""
        return overlap_degree(self.settings, cluster, cost) if self.sets_aside else 0


def strategies(settings: FSSDPSettings, *, reshard_every: int, num_groups: int = 1) -> list[Strategy]:
    """All of them, expert parallelism first.

    settings: what the variants of FSSDP have in common. reshard_every: steps between new owners and between new
    placements of EPLB. num_groups: of neighbouring experts, which EPLB keeps together.
    """

    def variant(planner: PlannerName, *, reshard: bool = False, rematerialize: bool = False) -> FSSDPSettings:
        return replace(settings, planner=planner, reshard_every=reshard_every if reshard else 0, rematerialize=rematerialize)

    paper: PlannerName = "sparse_materialization"
    ours: PlannerName = "two_level"
    return [
        Strategy("EP", variant("owners_only")),
        Strategy("ZeRO-3 experts", variant("everywhere", rematerialize=True)),
        Strategy("paper: Algorithm 2", variant("owners_only", reshard=True), sets_aside=False),
        Strategy("paper: Algorithm 1", variant(paper)),
        Strategy("paper: Algorithms 1, 2", variant(paper, reshard=True)),
        Strategy("two-level", variant(ours), split=split_quota),
        Strategy("two-level, re-mat.", variant(ours, rematerialize=True), split=split_quota),
        Strategy("FasterMoE", variant("owners_only"), planner=shadowing, after_gate=True),
        Strategy(
            "EPLB",
            variant("owners_only"),
            planner=lambda settings, cluster, cost: PeriodicEPLB(cluster, settings.extra_slots, reshard_every, num_groups),
            split=split_equally,
        ),
    ]


def shadowing(settings: FSSDPSettings, cluster: Cluster, cost: LayerCost) -> Planner:
    """FasterMoE's rule. Its model knows one bandwidth, that of a rank: here its share of the node's links. It counts two
    matrices: a gated expert's three are as many parameters in two wider ones."""
    members = cluster.num_ranks / cluster.num_nodes
    bandwidth = cluster.inter_bandwidth / members if cluster.num_nodes > 1 else cluster.intra_bandwidth
    parameters = cost.flops_per_token / 2
    value_bytes = round(cost.expert_bytes / parameters)
    hidden_size = cost.token_bytes // value_bytes
    expansion = parameters / (2 * hidden_size**2)

    def plan(counts: Integers, owner: Integers) -> PlacementPlan:
        shadows = fastermoe_shadow(counts, hidden_size, expansion, bandwidth, cluster.flops, value_bytes)
        return PlacementPlan.replicated(owner, shadows, cluster.num_ranks)

    return plan


class PeriodicEPLB:
    """A planner that places replicas when it first sees loads, and anew after every ``every`` steps. Ranks have slots for
    their share of the experts and ``extra_slots`` more."""

    def __init__(self, cluster: Cluster, extra_slots: int, every: int, num_groups: int) -> None:
        self.cluster, self.extra_slots, self.every, self.num_groups = cluster, extra_slots, every, num_groups
        self.plan: PlacementPlan | None = None
        self.age = 0

    def __call__(self, predicted: Integers, owner: Integers) -> PlacementPlan:
        if not predicted.any():
            return self.plan or owners_only(owner, self.cluster.num_ranks)
        if self.plan is None or self.age == self.every:
            self.plan = self.place(predicted.sum(axis=0), owner if self.plan is None else self.plan.owner)
            self.age = 0
        self.age += 1
        return self.plan

    def place(self, loads: Integers, owner: Integers) -> PlacementPlan:
        """The placement for loads [E]. EPLB knows no owners: experts stay with their owners [E] where these keep a replica,
        and go to the holder that owns the fewest otherwise, so that states move little and stay spread."""
        ranks = self.cluster.num_ranks
        slots = ranks * (-(-loads.size // ranks) + self.extra_slots)
        plan = eplb(loads[None], slots, self.num_groups, self.cluster.num_nodes, ranks).plan(0, ranks)
        stays = plan.holders[np.arange(loads.size), owner]
        owned = np.bincount(owner[stays], minlength=ranks)
        owner = owner.copy()
        for expert in np.flatnonzero(~stays):
            candidates = np.flatnonzero(plan.holders[expert])
            owner[expert] = candidates[owned[candidates].argmin()]
            owned[owner[expert]] += 1
        return replace(plan, owner=owner)


def split_equally(counts: Integers, plan: PlacementPlan, cluster: Cluster) -> Integers:
    """Equal parts to all holders, near or far, which is what EPLB balances.

    counts: [R, E] int64. Returns [R, E, R] int64; of n rows over k holders each gets floor(n / k), and holder j one more
    when (j - source) mod k < n mod k.
    """
    k = plan.holders.sum(axis=1, keepdims=True)
    share, remainder = np.divmod(counts[:, :, None], k)
    place = plan.holders.cumsum(axis=1) - 1 - np.arange(len(counts))[:, None, None]
    return (share + (place % k < remainder)) * plan.holders


def experts_by_rank(plans: list[PlacementPlan]) -> tuple[Integers, Integers]:
    """([L, R] experts that each rank owns, [L, R] copies that it holds) under the plans of all layers."""
    owned = np.array([np.bincount(plan.owner, minlength=plan.num_ranks) for plan in plans])
    return owned, np.array([plan.copies.sum(axis=0) for plan in plans])
