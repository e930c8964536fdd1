"""``moetrain bench``: the machine's linear costs, on ranks that are started here or by torchrun; one MoE layer against its limit."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist

from moetrain.config import dump, load, setting
from moetrain.errors import ConfigError, Problem
from moetrain.launch.local import join_group, refuse, start_workers, take_device
from moetrain.launch.signals import StopRequest, stop_on_signals
from moetrain.parallel.profile import MachineProfile, Sweep, measure
from moetrain.parallel.ranks import Ranks
from moetrain.testing.layer_bench import (
    CopyLimit,
    DenseLimit,
    LayerCase,
    OwnLayer,
    Pair,
    Seconds,
    cast_inputs,
    expected_results,
    interleave,
    make_inputs,
    peak_bytes,
    time_step,
    worst_error,
)
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


@dataclass(kw_only=True)
class LayerSettings:
    """Times one MoE layer, forward and backward, against its bare matrix products."""

    tokens: int = setting(4096, doc="T, tokens per step", ge=1)
    hidden: int = setting(512, doc="D, model width", ge=1)
    width: int = setting(256, doc="F, hidden width of one expert", ge=1)
    experts: int = setting(64, doc="E, experts", ge=2)
    top_k: int = setting(8, doc="K, experts per token", ge=1)
    precision: Literal["float32", "bfloat16", "mixed"] = setting(
        "float32", doc="of weights and products; mixed: float32 weights and weight gradients, products in bfloat16"
    )
    routing: str = setting("balanced", doc="balanced, or zipf:A for loads that fall as rank^-A")
    rounds: int = setting(9, doc="timed steps", ge=1)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", doc="auto takes a GPU if there is one")


@dataclass(frozen=True)
class LayerSpeed:
    """One layer's rounds, each with the matrix products just before it; seconds of a copy of the rows that must move; the most
    bytes allocated in a step; the largest error in units of what the precision allows."""

    pairs: list[Pair]
    copy_seconds: float
    peak_bytes: int
    error: float


def layer(settings: LayerSettings) -> LayerSpeed:
    """Measure on this process's threads. Raises ConfigError if the sizes make no layer."""
    sizes = (settings.tokens, settings.hidden, settings.width, settings.experts, settings.top_k)
    try:
        case = LayerCase(*sizes, precision=settings.precision, routing=settings.routing)
    except ValueError as problem:
        raise ConfigError(str(problem)) from problem
    device = take_device(Ranks(), settings.device)
    inputs = make_inputs(case)
    own = OwnLayer.ready(case, cast_inputs(inputs, case, device))
    own.prepare()
    own.step()
    error, _ = worst_error(own.results(), expected_results(inputs, case.top_k), case)
    peak = peak_bytes(own, device)
    dense, copy = DenseLimit(case, device), CopyLimit(case, device)

    def time_own() -> Seconds:
        own.prepare()
        return time_step(own.step, device)

    for warm_up in (time_own, dense.step, dense.step, copy.step):
        warm_up()
    copies = [time_step(copy.step, device).wall for _ in range(settings.rounds)]
    pairs = interleave({"moetrain": time_own}, lambda: time_step(dense.step, device), settings.rounds)
    return LayerSpeed(pairs["moetrain"], statistics.median(copies), peak, error)
