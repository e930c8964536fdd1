"""Replays a trace under a strategy: before each step it plans from the loads of earlier ones, as training does.

Letters: S steps, L MoE layers, R ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.parallel.placement.cost import LayerCost, Traffic, gather_traffic, layer_time, tally
from moetrain.parallel.placement.plan import Cluster, Integers, PlacementPlan
from moetrain.parallel.placement.planners import even_sharding, heterogeneous_sharding
from moetrain.parallel.placement.predict import SlidingWindow, prediction_error
from moetrain.parallel.scheduling import make_predictor
from moetrain.simulate.memory import RankMemory, rank_memory
from moetrain.simulate.model import ModelSizes
from moetrain.simulate.strategies import Strategy, experts_by_rank

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class TierBytes:
    """Bytes of all ranks and MoE layers, mean per step: within nodes and between nodes."""

    intra: float
    inter: float


@dataclass(frozen=True)
class Figures:
    """One strategy over the steps of a trace, warm-up left out.

    copies_mean: of a rank and layer; copies_max: largest of any rank, layer and step. load_mean, load_worst: rows of the
    busiest rank over the mean of all ranks, averaged over layers and steps, and largest. tokens: dispatch and combine,
    forward and backward. gather, reduce: copies of experts and their gradients. seconds: of all MoE layers forward and
    backward, mean per step; all_to_all, compute and exposed are its parts. experts_moved: changes of owner per step.
    prediction_error: |actual - predicted|_1 / actual.
    """

    name: str
    copies_mean: float
    copies_max: int
    load_mean: float
    load_worst: float
    tokens: TierBytes
    gather: TierBytes
    reduce: TierBytes
    seconds: float
    all_to_all_seconds: float
    compute_seconds: float
    exposed_seconds: float
    experts_moved: float
    prediction_error: float
    memory: RankMemory


@dataclass(frozen=True, eq=False)
class Replay:
    """figures, and what a plot shows over all steps: load [S, L], the busiest rank's rows over the mean; seconds [S]."""

    figures: Figures
    load: Numbers
    seconds: Numbers


class Placements:
    """The plans of all MoE layers from step to step, made as :class:`moetrain.parallel.parallelize.ParallelModel` makes them."""

    def __init__(self, strategy: Strategy, cluster: Cluster, costs: Sequence[LayerCost], num_experts: int) -> None:
        settings = strategy.settings
        self.strategy, self.cluster = strategy, cluster
        self.owners = np.tile(even_sharding(num_experts, cluster.num_ranks), (len(costs), 1))
        self.planners = [strategy.planner(settings, cluster, cost) for cost in costs]
        self.history = make_predictor(settings)
        self.loads = SlidingWindow()
        self.set_aside = min(strategy.set_aside(cluster, cost) for cost in costs)
        self.steps = 0

    def plans(self, counts: Integers) -> tuple[list[PlacementPlan], Integers]:
        """Plans of the next step and the counts [L, R, E] that they are for; ``counts`` are what the step will have."""
        known = self.history.predict()
        predicted = np.zeros_like(counts) if known is None else known
        basis = counts if self.strategy.after_gate else predicted
        return [plan(part, owner) for plan, part, owner in zip(self.planners, basis, self.owners, strict=True)], predicted

    def observe(self, counts: Integers) -> None:
        """Take the counts [L, R, E] of a step into the history; it may be time for new owners."""
        self.history.push(counts)
        self.loads.push(counts.sum(axis=1))
        self.steps += 1
        every, loads = self.strategy.settings.reshard_every, self.loads.predict()
        if every and self.steps % every == 0 and loads is not None:
            self.owners = heterogeneous_sharding(loads, self.cluster, self.set_aside, self.owners)


def replay(
    strategy: Strategy, counts: Integers, sizes: ModelSizes, costs: Sequence[LayerCost], cluster: Cluster, *, warm_up: int = 0
) -> Replay:
    """Figures of one strategy.

    counts: [S, L, R, E] int64 rows. costs: of the L layers, under the strategy's settings. warm_up: first steps, of which
    there is no full history; they are replayed but not counted.
    """
    costs = [strategy.adjust(cost) for cost in costs]
    placements = Placements(strategy, cluster, costs, counts.shape[-1])
    owners: Integers | None = None
    memories, copies, rows, numbers, moved, errors = [], [], [], [], [], []
    for step, now in enumerate(counts):
        plans, predicted = placements.plans(now)
        splits = [strategy.split(part, plan, cluster) for part, plan in zip(now, plans, strict=True)]
        placements.observe(now)
        previous, owners = owners, np.array([plan.owner for plan in plans])
        if step < warm_up:
            continue
        numbers.append([layer_numbers(*layer, cluster, strategy) for layer in zip(splits, plans, costs, strict=True)])
        rows.append([split.sum(axis=(0, 1)) for split in splits])
        owned, copied = experts_by_rank(plans)
        copies.append(copied)
        memories.append(rank_memory(sizes, owned, copied, costs))
        moved.append(0 if previous is None else int((previous != owners).sum()))
        errors.append(0.0 if strategy.after_gate else prediction_error(now, predicted))

    def per_step(name: str) -> Numbers:
        """[S] or [S, tiers], all layers together."""
        return np.array([[layer[name] for layer in layers] for layers in numbers]).sum(axis=1)

    def seconds(name: str) -> float:
        return float(per_step(name).mean())

    def tiers(name: str) -> TierBytes:
        intra, inter = per_step(name).mean(axis=0).tolist()
        return TierBytes(intra, inter)

    load = busiest_over_mean(np.array(rows))
    figures = Figures(
        name=strategy.name,
        copies_mean=float(np.mean(copies)),
        copies_max=int(np.max(copies)),
        load_mean=float(load.mean()),
        load_worst=float(load.max()),
        tokens=tiers("tokens"),
        gather=tiers("gather"),
        reduce=tiers("reduce"),
        seconds=seconds("seconds"),
        all_to_all_seconds=seconds("all_to_all"),
        compute_seconds=seconds("compute"),
        exposed_seconds=seconds("exposed"),
        experts_moved=float(np.mean(moved)),
        prediction_error=float(np.mean(errors)),
        memory=max(memories, key=lambda memory: memory.total),
    )
    return Replay(figures, load, per_step("seconds"))


def layer_numbers(split: Integers, plan: PlacementPlan, cost: LayerCost, cluster: Cluster, strategy: Strategy) -> dict[str, Any]:
    """Seconds, and bytes within and between nodes, of one layer's forward and backward in one step."""
    transport = strategy.settings.transport
    time = layer_time(split, plan, cluster, cost, transport=transport)
    copies = gather_traffic(plan, cluster, transport)
    return {
        "seconds": time.total,
        "all_to_all": 4 * time.all_to_all,
        "compute": 3 * time.compute,
        "exposed": time.exposed,
        "tokens": tier_bytes(tally(split.sum(axis=1), cluster), 4 * cost.token_bytes),
        "gather": tier_bytes(copies, cost.expert_bytes * (2 if cost.rematerialize else 1)),
        "reduce": tier_bytes(copies, cost.gradient_bytes),
    }


def tier_bytes(traffic: Traffic, unit_bytes: float) -> tuple[float, float]:
    """Bytes within and between nodes, all ranks together."""
    sent = (traffic.sent_intra, traffic.sent_inter)
    intra, inter = (float(part.sum() * unit_bytes / traffic.pieces) for part in sent)
    return intra, inter


def busiest_over_mean(rows: Integers) -> Numbers:
    """[..., R] rows of each rank -> [...] the largest over the mean; 1 where there are no rows."""
    mean = rows.mean(axis=-1)
    return np.divide(rows.max(axis=-1), mean, out=np.ones_like(mean), where=mean > 0)
