"""Starting the ranks of a run: in this process, as workers of torch's elastic launcher, or as one of torchrun's."""

from __future__ import annotations

import ctypes
import json
import logging
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from moetrain.config import dump, load
from moetrain.data import PreparedData
from moetrain.errors import ConfigError, MoetrainError
from moetrain.launch.compose import build_config
from moetrain.launch.runs import check_compatible, check_resume, config_hash, open_run, resolve_run_dir
from moetrain.launch.signals import StopRequest, stop_on_signals
from moetrain.parallel.ranks import Ranks
from moetrain.train.settings import Config

NOT_BEGUN = "stopped before training began"

JOBS = count()  # of this process, which under torchrun trains all jobs of a sweep

Task = Callable[..., Any]
"""What a worker runs: (its rank, its stop request, arguments of the launcher) -> result."""


class ReportedError(MoetrainError):
    """A failure of a worker, already worded for the user."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def train(plain: dict[str, Any]) -> dict[str, Any]:
    """Train from a resolved plain configuration; returns what the main rank's run_training returned.

    Everything that the user can have got wrong is checked, and the data prepared, before any process starts.
    """
    config = build_config(plain)
    config.data = config.data.located()
    if "RANK" in os.environ:
        return train_under_torchrun(config)
    if config.launch.nnodes > 1:
        raise ConfigError(
            f"launch.nnodes = {config.launch.nnodes}: start moetrain on every machine with torchrun --nnodes {config.launch.nnodes} "
            f"--nproc-per-node {config.launch.nproc_per_node} --rdzv-backend c10d --rdzv-endpoint HOST:PORT -m moetrain.launch.train ..."
        )
    with stop_on_signals(refuse(NOT_BEGUN)) as stop:
        run_dir = resolve_run_dir(config)
        check_resume(config, run_dir)
        check_compatible(config, run_dir)
        data = prepare_data(config)
        open_run(config, run_dir)
        if config.launch.nproc_per_node == 1:
            stop.forward = None
            return run_rank(config, Ranks(), run_dir, data, stop)
        arguments = (dump(config), str(run_dir), str(data.folder))
        advice = "; the same command continues from the last checkpoint"
        return start_workers(config.launch.nproc_per_node, train_worker, arguments, stop, stopped=NOT_BEGUN, advice=advice)[0]


def refuse(message: str) -> Callable[[int], NoReturn]:
    """What a signal does where there is nothing to save."""

    def handle(number: int) -> NoReturn:
        raise ReportedError(message, 128 + number)

    return handle


def prepare_data(config: Config) -> PreparedData:
    """Prepare the data, with a message if that takes work, and refuse a vocabulary or a state that does not fit."""
    from moetrain.data import prepare
    from moetrain.train.run import check_vocabulary

    shown: set[str] = set()

    def progress(stage: str, done: int, total: int | None) -> None:
        if stage != "reading" and stage not in shown and Ranks.detect().is_main:
            shown.add(stage)
            print(f"preparing the data: {stage}", flush=True)

    data = prepare(config.data, progress=progress)
    check_vocabulary(config, data)
    check_memory(config, data.vocab_size)
    return data


def check_memory(config: Config, vocab_size: int) -> None:
    """Refuse a model whose state alone is larger than the memory that each rank has."""
    from moetrain.simulate.clusters import memory_here
    from moetrain.simulate.fit import device_type, memory_problems
    from moetrain.train.run import build_model

    here, launch = Ranks.detect(), config.launch
    world = here.world_size if "RANK" in os.environ else launch.nproc_per_node * launch.nnodes
    local = here.local_world_size if "RANK" in os.environ else launch.nproc_per_node
    problems = list(
        memory_problems(
            build_model(config, vocab_size), config.parallel.resolve(world), memory_here(device_type(config.train.device), local)
        )
    )
    if problems:
        raise ConfigError(problems)


def run_rank(config: Config, ranks: Ranks, run_dir: Path, data: PreparedData, stop: StopRequest) -> dict[str, Any]:
    """run_training on this rank, with its threads and device set."""
    from moetrain.train.run import run_training

    ready(config, ranks)
    return run_training(config, ranks, run_dir, data=data, stop=stop)


def ready(config: Config, ranks: Ranks) -> torch.device:
    """The device of this rank, its threads and memory set as for training."""
    device = take_device(ranks, config.train.device, config.train.threads)
    if device.type == "cpu" and config.train.keep_freed_memory:
        keep_freed_memory()
    return device


def take_device(ranks: Ranks, choice: str, threads: int | None = None) -> torch.device:
    """The device of this rank, made the current one, with its share of the CPU's threads."""
    if threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or max(1, available_cores() // ranks.local_world_size))
    device = ranks.device(choice)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def keep_freed_memory() -> None:
    """glibc: memory that is freed stays with this process. By default large tensors go back to the system, which then clears
    the pages of each step's tensors again: a fifth of the time of an MoE layer on CPU."""
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def available_cores() -> int:
    """Cores that this process may use, which a container or a batch system can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def join_group(ranks: Ranks, choice: str, timeout_seconds: float) -> None:
    """The default process group: gloo on CPU; nccl with gloo beside it (for checkpoints) on GPU."""
    backend = "gloo" if ranks.device(choice).type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_seconds)
    # torchrun's store outlives the group and still holds the addresses of the previous job's ranks
    store, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.world_size, timeout=timeout))
    store = dist.PrefixStore(f"job{next(JOBS)}", store)
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)


def die_with_parent() -> None:
    """Linux: this process is killed when the one that started it ends, however it ends."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def worker(task: Task, arguments: tuple[Any, ...], errors: str, launcher: int) -> Any:
    """One rank started by :func:`start_workers`. What goes wrong is left in the folder ``errors`` for the launcher."""
    die_with_parent()
    if os.getppid() != launcher:
        sys.exit("the launcher ended while this worker was starting")
    import moetrain.components  # noqa: F401  the registry of a fresh process

    ranks = Ranks.detect()
    with stop_on_signals() as stop:
        try:
            return task(ranks, stop, *arguments)
        except MoetrainError as error:
            leave_report(Path(errors), ranks.rank, str(error), error.exit_code)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except Exception:
            leave_report(Path(errors), ranks.rank, f"rank {ranks.rank} failed:\n{traceback.format_exc()}", 1)


def train_worker(ranks: Ranks, stop: StopRequest, plain: dict[str, Any], run_dir: str, data: str) -> dict[str, Any]:
    """The task of a worker that trains."""
    config = load(Config, plain)
    join_group(ranks, config.train.device, config.launch.timeout_seconds)
    result = run_rank(config, ranks, Path(run_dir), PreparedData(Path(data)), stop)
    dist.destroy_process_group()
    return result


def leave_report(errors: Path, rank: int, message: str, exit_code: int) -> NoReturn:
    """End this worker; the launcher shows the report that is first in time: the others follow from it."""
    report = {"time": time.time(), "message": message, "exit_code": exit_code}
    (errors / f"{rank}.json").write_text(json.dumps(report), encoding="utf-8")
    sys.exit(exit_code)


def start_workers(
    processes: int, task: Task, arguments: tuple[Any, ...], stop: StopRequest, *, stopped: str, advice: str = ""
) -> dict[int, Any]:
    """Run ``task(ranks, stop, *arguments)`` in child processes, which get our signals; returns what each rank returned.

    task: top-level function; arguments and results must be picklable. stopped: message of a signal that comes before
    the workers handle it. Raises ReportedError with the first failure; a killed rank's ends with ``advice``.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # the agent logs what is reported below, once and in fewer words
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)

    def forward(number: int) -> None:
        children = [child.pid for child in multiprocessing.active_children() if child.pid is not None and child.is_alive()]
        if not children:
            raise ReportedError(stopped, 128 + number)
        for pid in children:
            os.kill(pid, number)

    stop.forward = forward
    with tempfile.TemporaryDirectory(prefix="moetrain-") as scratch:
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=f"moetrain-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            max_restarts=0,
            monitor_interval=0.1,
            start_method="spawn",
            logs_specs=DefaultLogsSpecs(log_dir=scratch),
            signals_to_handle="SIGHUP,SIGQUIT",  # the others are ours: workers finish their step
        )
        try:
            return elastic_launch(launch, worker)(task, arguments, scratch, os.getpid())
        except ChildFailedError as error:
            if stop.requested and error.get_first_failure()[1].exitcode == -stop.requested:
                # the signal came while workers were starting and had no handler yet
                raise ReportedError(stopped, 128 + stop.requested) from error
            raise describe_failure(error, Path(scratch), advice) from error


def describe_failure(error: Any, scratch: Path, advice: str = "") -> ReportedError:
    """The cause of a ChildFailedError: a rank that ended without a report, else the report that is first in time."""
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return ReportedError(f"rank {rank} was killed by {name}{advice}")
    if failure.exitcode == 128 + signal.SIGINT:
        return ReportedError("interrupted before the current step was done", failure.exitcode)
    if not (scratch / f"{rank}.json").exists():
        return ReportedError(f"rank {rank} ended with exit status {failure.exitcode} and no message")
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in scratch.glob("*.json")]
    first = min(reports, key=lambda report: report["time"])
    return ReportedError(first["message"], first["exit_code"])


def train_under_torchrun(config: Config) -> dict[str, Any]:
    """This process is one of torchrun's workers: rank 0's configuration and run folder hold for all."""
    ranks = Ranks.detect()
    data = prepare_data(config)  # behind a lock: one rank of a machine works, the others find the result
    with stop_on_signals() as stop:
        join_group(ranks, config.train.device, config.launch.timeout_seconds)
        decision: list[Any] = [None]
        if ranks.is_main:
            try:
                run_dir = resolve_run_dir(config)
                check_resume(config, run_dir)
                open_run(config, run_dir)
                decision = [{"run_dir": str(run_dir), "config": dump(config)}]
            except MoetrainError as error:
                decision = [{"error": str(error), "exit_code": error.exit_code}]
        dist.broadcast_object_list(decision)
        if "error" in decision[0]:
            raise ReportedError(decision[0]["error"], decision[0]["exit_code"])
        theirs = load(Config, decision[0]["config"])
        hashes: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(hashes, (config_hash(config), data.content_hash))
        different = [str(rank) for rank, value in enumerate(hashes) if value != hashes[0]]
        if different:
            raise ReportedError(f"started with another configuration or other data than rank 0: rank {', '.join(different)}", 2)
        try:
            result = run_rank(theirs, ranks, Path(decision[0]["run_dir"]), data, stop)
        except MoetrainError as error:
            if ranks.local_rank:  # may have happened on this rank alone; the first of each machine prints its own
                print(f"moetrain: error on rank {ranks.rank}: {error}", file=sys.stderr, flush=True)
            raise
        dist.destroy_process_group()
        return result
