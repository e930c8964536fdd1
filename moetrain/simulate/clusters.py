"""Clusters by name: links, processors and memory as papers and makers state them, or as training finds them here."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, Literal

import torch

from moetrain.parallel.placement.plan import Cluster
from moetrain.parallel.profile import Machine, Sweep, load_profile
from moetrain.parallel.scheduling import describe_cluster

ClusterName = Literal["here", "h100", "hecate_a", "hecate_b"]

HECATE: dict[str, tuple[dict[str, Any], float]] = {
    "hecate_a": (dict(intra_bandwidth=150e9, inter_bandwidth=12.5e9, latency=20e-6, flops=62e12), 32 * 2.0**30),
    "hecate_b": (dict(intra_bandwidth=300e9, inter_bandwidth=50e9, latency=20e-6, flops=156e12), 40 * 2.0**30),
}
"""Links and bytes per rank of arXiv 2502.02581 section 5: V100s and A100s, of whose NVLinks 300 and 600 GB/s count both
directions. Latency, and experts at half of the tensor cores' 125 and 312 TFLOP/s, are assumed."""


def named_cluster(name: ClusterName, *, nodes: int | None = None, ranks_per_node: int | None = None) -> tuple[Cluster, float | None]:
    """The cluster of this name and the bytes of memory of a rank, None if they are not known.

    here: this machine as `moetrain bench profile` has measured it with as many nodes and ranks, else as training assumes
    it. nodes, ranks_per_node: default 1 x 1 for here, 4 x 8 for the others.
    """
    if name == "here":
        nodes, ranks_per_node = nodes or 1, ranks_per_node or 1
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        backend = "nccl" if device.type == "cuda" else "gloo"
        file = replace(Machine.here(device, nodes * ranks_per_node, ranks_per_node, Sweep().on(device.type).dtype), backend=backend).file()
        profile = load_profile(file) if file.exists() else None
        return describe_cluster(Cluster.even(nodes, ranks_per_node).node_of, device, profile), memory_here(device, ranks_per_node)
    shape = Cluster.even(nodes or 4, ranks_per_node or 8)
    if name == "h100":
        return describe_cluster(shape.node_of, torch.device("cuda"), None), 80e9
    links, memory = HECATE[name]
    return replace(shape, **links), memory


def memory_here(device: torch.device, ranks: int) -> float | None:
    """Bytes of memory for each of ``ranks`` ranks on this machine: a GPU each, or equal parts of the main memory."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(0).total_memory)
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) / ranks
