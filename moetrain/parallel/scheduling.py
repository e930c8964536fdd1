"""From a layout's settings and a model's sizes to the planner and the load prediction of each MoE layer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moetrain.moe.experts import Experts
from moetrain.parallel.layouts import FSSDPSettings
from moetrain.parallel.placement.cost import LayerCost
from moetrain.parallel.placement.dispatch import split_even, split_quota
from moetrain.parallel.placement.plan import Cluster, Integers, PlacementPlan
from moetrain.parallel.placement.planners import calibrate, everywhere, owners_only, sparse_materialization
from moetrain.parallel.placement.predict import Exponential, LastStep, LoadPredictor, SlidingWindow
from moetrain.parallel.placement.scheduler import Planner
from moetrain.parallel.placement.two_level import two_level


def layer_cost(
    experts: Experts, hidden_size: int, dtype: torch.dtype, settings: FSSDPSettings, *, mixer_flops: float, cluster: Cluster
) -> LayerCost:
    """Sizes of one layer. mixer_flops: forward FLOPs per rank and pass of what precedes the layer, under which its copies
    travel; the backward takes twice as long."""
    parameters = sum(p[0].numel() if p.shape[0] else p.shape[1:].numel() for p in experts.parameters())
    hidden = mixer_flops / cluster.flops
    return LayerCost(
        token_bytes=hidden_size * dtype.itemsize,
        expert_bytes=parameters * dtype.itemsize,
        # partial sums of staged transports travel in at least float32
        gradient_bytes=parameters * (dtype.itemsize if settings.transport == "direct" else max(4, dtype.itemsize)),
        flops_per_token=experts.flops_per_row(),
        hidden_forward=hidden,
        hidden_backward=2 * hidden,
        rematerialize=settings.rematerialize,
    )


def overlap_degree(settings: FSSDPSettings, cluster: Cluster, cost: LayerCost) -> int:
    """Experts that can be gathered while the mixer computes (Hecate 2502.02581 section 4.2), at the bandwidth between
    nodes if there are several."""
    if settings.overlap_degree is not None:
        return settings.overlap_degree
    bandwidth = cluster.inter_bandwidth if cluster.num_nodes > 1 else cluster.intra_bandwidth
    return int(cost.hidden_forward * bandwidth / cost.expert_bytes)


def make_planner(settings: FSSDPSettings, cluster: Cluster, cost: LayerCost) -> Planner:
    """The planner that the settings name."""

    def plan(predicted: Integers, owner: Integers) -> PlacementPlan:
        if settings.planner == "owners_only" or (settings.planner != "everywhere" and not predicted.any()):
            return owners_only(owner, cluster.num_ranks)
        if settings.planner == "everywhere":
            return everywhere(owner, cluster.num_ranks)
        if settings.planner == "two_level":
            return two_level(predicted, owner, cluster, cost, settings.extra_slots)
        degree = overlap_degree(settings, cluster, cost)
        return sparse_materialization(predicted.sum(axis=0), owner, cluster, degree, settings.extra_slots)

    return plan


def make_calibration(
    settings: FSSDPSettings, cluster: Cluster, cost: LayerCost
) -> Callable[[Integers, PlacementPlan], PlacementPlan] | None:
    """What the settings say to do once the true counts [R, E] are known (Hecate 2502.02581 section 4.4)."""
    if not settings.calibrate or settings.planner in ("owners_only", "everywhere"):
        return None
    split = split_even if settings.split == "even" else split_quota
    return lambda counts, plan: calibrate(counts, plan, cluster, cost, settings.extra_slots, settings.extra_slots, split)


def make_predictor(settings: FSSDPSettings) -> LoadPredictor:
    """The load prediction that the settings name."""
    if settings.prediction == "window":
        return SlidingWindow(settings.window)
    return LastStep() if settings.prediction == "last" else Exponential(settings.decay)
