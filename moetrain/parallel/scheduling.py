"""From a layout's settings and a model's sizes to the planner and the load prediction of each MoE layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from moetrain.config import dump, load
from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoELayer
from moetrain.parallel.layouts import FSSDPSettings, Layout
from moetrain.parallel.placement.cost import LayerCost
from moetrain.parallel.placement.dispatch import split_even, split_quota
from moetrain.parallel.placement.plan import Cluster, Integers, PlacementPlan
from moetrain.parallel.placement.planners import calibrate, everywhere, owners_only, sparse_materialization
from moetrain.parallel.placement.predict import Exponential, LastStep, LoadPredictor, SlidingWindow
from moetrain.parallel.placement.schedule import best_degree
from moetrain.parallel.placement.scheduler import Planner
from moetrain.parallel.placement.two_level import two_level
from moetrain.parallel.profile import Machine, MachineProfile, Sweep, load_profile, measure
from moetrain.parallel.ranks import Ranks


def machine_profile(layout: Layout, ranks: Ranks, device: torch.device, dtype: torch.dtype) -> MachineProfile | None:
    """Measured costs of this machine, the same on every rank: the main rank's file, or measured now (and kept) if the
    layout says so. None: costs are assumed. dtype: in which experts compute; for float64 float32 is measured. Collective over the
    default group."""
    if layout.profile == "assume":
        return None
    per_node = layout.ranks_per_node or ranks.local_world_size
    sweep = Sweep(dtype="bfloat16" if dtype.itemsize == 2 else "float32")
    file = Machine.here(device, ranks.world_size, per_node, sweep.dtype).file()
    found = [dump(load_profile(file)) if ranks.is_main and file.exists() else None]
    dist.broadcast_object_list(found)
    if found[0] is not None:
        return load(MachineProfile, found[0])
    if layout.profile == "auto":
        return None
    profile = measure(sweep, device, dist.group.WORLD, per_node)
    if ranks.is_main:
        profile.save()
    return profile


def describe_cluster(node_of: tuple[int, ...], device: torch.device, profile: MachineProfile | None) -> Cluster:
    """Links and processors as measured, else as assumed: H100s with NVLink and 400 Gbit/s per node, or CPU cores that talk
    over loopback."""
    if profile is not None:
        return profile.cluster(node_of)
    if device.type == "cuda":
        return Cluster(node_of, intra_bandwidth=300e9, inter_bandwidth=50e9, latency=20e-6, flops=400e12)
    return Cluster(node_of, intra_bandwidth=1e9, inter_bandwidth=1e9, latency=1e-3, flops=80e9)


def pipeline_degree(layer: MoELayer, cost: LayerCost, tokens: int, cluster: Cluster, profile: MachineProfile | None) -> int:
    """Chunks in which the forward pass of one layer is fastest (FSMoE 2501.10714 section 4.3, by the exact makespan).
    1 without a profile or another rank. tokens: of a rank's pass, spread evenly over the ranks."""
    if profile is None or cluster.num_ranks == 1 or not tokens:
        return 1
    rows = tokens * getattr(getattr(layer.router, "config", None), "top_k", 1)
    work = {"all_to_all": rows * cost.token_bytes, "all_gather": 0.0, "reduce_scatter": 0.0, "experts": rows * cost.flops_per_token}
    costs = profile.chunk_costs(work)
    absent = costs.n == 0  # nothing is gathered or scattered inside an expert that is whole
    return int(best_degree(replace(costs, alpha=np.where(absent, 0.0, costs.alpha))))


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
