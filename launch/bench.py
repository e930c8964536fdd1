"""``moetrain bench``: the machine's linear costs, on ranks that are started here or by torchrun; one MoE layer against its limit;
each hot operation against its slow twin; whole training steps."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from moetrain.config import dump, load, setting
from moetrain.errors import ConfigError, Problem
from moetrain.launch.compose import build_config
from moetrain.launch.local import join_group, keep_freed_memory, prepare_data, ready, refuse, start_workers, take_device
from moetrain.launch.signals import StopRequest, stop_on_signals
from moetrain.parallel.profile import MachineProfile, Sweep, measure
from moetrain.parallel.ranks import Ranks
from moetrain.storage import storage_errors
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
from moetrain.testing.op_bench import OpSizes, OpSpeed, make_operations
from moetrain.testing.op_bench import measure as measure_op
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
    if device.type == "cpu":
        keep_freed_memory()  # as training does
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


@dataclass(kw_only=True)
class OpsSettings(OpSizes):
    """Times each hot operation, forward and backward, against its slow twin: the same by plain torch and autograd."""

    rounds: int = setting(9, doc="timed rounds of both", ge=1)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", doc="auto takes a GPU if there is one")
    out: str | None = setting(None, doc="file for all figures, a JSON line for each operation")


def ops(settings: OpsSettings) -> Iterator[OpSpeed]:
    """One operation after the other, on this process's threads; each is added to settings.out at once."""
    device = take_device(Ranks(), settings.device)
    out = None if settings.out is None else Path(settings.out).expanduser()
    if out is not None:
        try:
            out.write_text("", encoding="utf-8")
        except OSError as error:
            raise ConfigError([Problem("out", settings.out, f"cannot be written: {error.strerror}")]) from error
    for operation in make_operations(settings, device):
        speed = measure_op(operation, settings.rounds, device)
        if out is not None:
            sides = {side: [passes._asdict() for passes in getattr(speed, side)] for side in ("fast", "slow")}
            sizes = {name: value for name, value in dump(settings).items() if name != "out"}
            line = {**sizes, "device": device.type, **asdict(speed), **sides}
            with storage_errors(out), out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        yield speed


@dataclass(kw_only=True)
class StepSettings:
    """Times steps of training on one rank. All other arguments are overrides as for `moetrain train`.

    The run's own data is read; no run folder, checkpoint or evaluation is made.
    """

    steps: int = setting(10, doc="timed steps", ge=1)
    warm_up: int = setting(3, doc="steps before them", ge=0)


@dataclass(frozen=True)
class StepSpeed:
    """Lines of metrics.jsonl of the timed steps. peak_bytes: on CUDA of tensors, else of the process, its start included."""

    device: str
    lines: list[dict[str, Any]]
    peak_bytes: int | None


def step(settings: StepSettings, plain: dict[str, Any]) -> StepSpeed:
    """Train and throw the result away. plain: a resolved configuration, of which what is written is left out."""
    from moetrain.train.run import Trainer

    config = build_config(plain)
    processes = Ranks.detect().world_size if "RANK" in os.environ else config.launch.nproc_per_node * config.launch.nnodes
    if processes > 1:
        raise ConfigError([Problem("launch.nproc_per_node", processes, "must be 1: this measures one rank")])
    config.data = config.data.located()
    total = settings.warm_up + settings.steps
    config.train.steps = max(config.train.steps, total + 1)  # an evaluation follows the last step
    config.metrics.eval_every_steps, config.metrics.every_steps, config.checkpoint.every_steps = None, 1, total + 1
    config.logging.display, config.logging.wandb, config.logging.tensorboard = "none", "off", False
    with stop_on_signals(refuse("stopped")):
        data = prepare_data(config)
        device = ready(config, Ranks())
        with tempfile.TemporaryDirectory(prefix="moetrain-") as folder:
            with Trainer.start(config, Ranks(), Path(folder), data) as trainer:
                trainer.resume()
                for _ in range(total):
                    trainer.train_step(lambda: None)
            lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return StepSpeed(device.type, lines[-settings.steps :], peak_memory(device))


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of torch's allocator on CUDA, else the most memory this process ever had, if the system tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
