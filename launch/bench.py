"""``moetrain bench``: measurements of the machine, on ranks that are started here or by torchrun."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist

from moetrain.config import dump, load, setting
from moetrain.errors import ConfigError, Problem
from moetrain.launch.local import join_group, refuse, start_workers, take_device
from moetrain.launch.signals import StopRequest, stop_on_signals
from moetrain.parallel.profile import MachineProfile, Sweep, measure
from moetrain.parallel.ranks import Ranks
from moetrain.train.settings import LaunchSection

STOPPED = "stopped; no profile was written"


@dataclass(kw_only=True)
class ProfileSettings(Sweep):
    """Measures collectives and expert computation on this machine and keeps their linear costs for planning."""

    device: Literal["auto", "cpu", "cuda"] = setting("auto", doc="auto takes a GPU if there is one")
    ranks_per_node: int | None = setting(None, doc="neighbouring ranks that count as a node; default: those of a machine", ge=1)
    launch: LaunchSection = setting(default_factory=LaunchSection, doc="how many processes to start, as for training")


def profile(settings: ProfileSettings) -> MachineProfile:
    """Measure on all ranks; under torchrun every rank returns the same profile."""
    if "RANK" in os.environ:
        with stop_on_signals(refuse(STOPPED)):
            return measure_rank(Ranks.detect(), settings)
    if settings.launch.nnodes > 1:
        raise ConfigError(
            f"launch.nnodes = {settings.launch.nnodes}: start it on every machine with torchrun --nnodes {settings.launch.nnodes} "
            f"--nproc-per-node {settings.launch.nproc_per_node} --rdzv-backend c10d --rdzv-endpoint HOST:PORT -m moetrain bench profile ..."
        )
    processes = settings.launch.nproc_per_node
    if settings.ranks_per_node and processes % settings.ranks_per_node:
        raise ConfigError([Problem("ranks_per_node", settings.ranks_per_node, f"must divide launch.nproc_per_node ({processes})")])
    with stop_on_signals(refuse(STOPPED)) as stop:
        if processes == 1:
            return measure(settings, take_device(Ranks(), settings.device), ranks_per_node=settings.ranks_per_node)
        results = start_workers(processes, profile_worker, (dump(settings),), stop, stopped=STOPPED)
    return load(MachineProfile, results[0])


def profile_worker(ranks: Ranks, stop: StopRequest, plain: dict[str, Any]) -> dict[str, Any]:
    """The task of a worker that measures."""
    stop.forward = refuse(STOPPED)
    return dump(measure_rank(ranks, load(ProfileSettings, plain)))


def measure_rank(ranks: Ranks, settings: ProfileSettings) -> MachineProfile:
    """measure() on one of several ranks."""
    device = take_device(ranks, settings.device)
    join_group(ranks, settings.device, settings.launch.timeout_seconds)
    measured = measure(settings, device, dist.group.WORLD, settings.ranks_per_node)
    dist.destroy_process_group()
    return measured
