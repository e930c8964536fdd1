"""Clusters by name: links, processors and memory as their makers or papers state them, or as training assumes them here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from moetrain.parallel.parallelize import default_cluster

ClusterName = Literal["here", "h100", "hecate_a", "hecate_b"]


@dataclass(frozen=True)
class ClusterPreset:
    """Bandwidths in bytes/s as in :class:`moetrain.parallel.placement.plan.Cluster`, latency in seconds, flops in FLOP/s that
    experts reach, memory of a rank in bytes; None where it is not known."""

    nodes: int
    ranks_per_node: int
    intra_bandwidth: float
    inter_bandwidth: float
    latency: float
    flops: float
    memory: float | None


# arXiv 2502.02581 section 5: NVLink's 300 and 600 GB/s count both directions; experts at half of the tensor cores' 125 and
# 312 TFLOP/s, and 20 us of latency, are assumed
HECATE_A = ClusterPreset(4, 8, intra_bandwidth=150e9, inter_bandwidth=12.5e9, latency=20e-6, flops=62e12, memory=32 * 2.0**30)
HECATE_B = ClusterPreset(4, 8, intra_bandwidth=300e9, inter_bandwidth=50e9, latency=20e-6, flops=156e12, memory=40 * 2.0**30)


def preset(name: ClusterName, *, ranks: int = 1) -> ClusterPreset:
    """The cluster of this name. here: this machine with ``ranks`` ranks, as training assumes it without a profile."""
    if name == "hecate_a":
        return HECATE_A
    if name == "hecate_b":
        return HECATE_B
    if name == "h100":
        return assumed(torch.device("cuda"), nodes=4, ranks_per_node=8, memory=80e9)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return assumed(device, nodes=1, ranks_per_node=ranks, memory=memory_here(device, ranks))


def assumed(device: torch.device, *, nodes: int, ranks_per_node: int, memory: float | None) -> ClusterPreset:
    """What training assumes of processors of this type."""
    links = default_cluster((0,), device)
    return ClusterPreset(
        nodes, ranks_per_node, links.intra_bandwidth, links.inter_bandwidth, latency=links.latency, flops=links.flops, memory=memory
    )


def memory_here(device: torch.device, ranks: int) -> float | None:
    """Bytes of memory for each of ``ranks`` ranks on this machine: a GPU each, or equal parts of the main memory."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(0).total_memory)
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) / ranks
