"""The process behind one rank of :func:`moetrain.testing.distributed.run_distributed`.

A worker is started once and runs many tasks. Between tasks it puts back what a task may have changed in the
process (environment, working folder, random state, default dtype), so that tests do not see each other.
"""

from __future__ import annotations

import ctypes
import datetime
import faulthandler
import gc
import importlib
import importlib.util
import os
import pickle
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import _redistribute
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

STACKS_SIGNAL = signal.SIGQUIT
"""On this signal a worker writes the stacks of all its threads; it works inside a collective too."""

_PR_SET_PDEATHSIG = 1
_LOST_CONNECTION = re.compile(r"gloo/transport|monitoredBarrier|Connection (closed|reset|refused)|Broken pipe|connectFullMesh")


@dataclass(frozen=True)
class Task:
    """One rank's share of a call. function: qualified name in the module. call: pickled (args, kwargs)."""

    module: str
    file: str
    function: str
    call: bytes
    rank: int
    world_size: int
    store_port: int
    store_prefix: str
    timeout: float
    sys_path: list[str]


@dataclass(frozen=True)
class Report:
    """How a rank's share ended, at ``when`` (seconds of the machine's monotonic clock).

    value: pickled result. failure: traceback as text, or how the process died; None after success.
    error: the pickled exception, if it can be pickled. lost_connection: the rank failed only because another one
    went away.
    """

    rank: int
    when: float
    value: bytes = b""
    failure: str | None = None
    error: bytes = b""
    lost_connection: bool = False
    died: bool = False


def main(connection_fd: int, stacks_fd: int, parent: int) -> None:
    """Run tasks from the connection until it closes."""
    _die_with_parent(parent)
    faulthandler.register(STACKS_SIGNAL, file=stacks_fd, all_threads=True)
    # Ctrl-C reaches the whole process group: the parent decides which workers it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    torch.set_num_threads(1)
    connection = Connection(connection_fd)
    connection.send("ready")
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(_report(task))


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        sys.exit(1)


def _report(task: Task) -> Report:
    try:
        with _process_state(task):
            value = _run(task)
    except BaseException as error:
        return Report(
            rank=task.rank,
            when=time.monotonic(),
            failure="".join(traceback.format_exception(error)),
            error=_pickled(error),
            lost_connection=_is_lost_connection(error),
        )
    return Report(rank=task.rank, when=time.monotonic(), value=value)


def _run(task: Task) -> bytes:
    function = _resolve(task)
    args, kwargs = pickle.loads(task.call)
    timeout = datetime.timedelta(seconds=task.timeout)
    store = dist.PrefixStore(task.store_prefix, dist.TCPStore("127.0.0.1", task.store_port, is_master=False, timeout=timeout))
    dist.init_process_group("gloo", store=store, rank=task.rank, world_size=task.world_size, timeout=timeout)
    try:
        value = pickle.dumps(function(task.rank, task.world_size, *args, **kwargs))
        if dist.is_initialized():
            dist.barrier()  # closing a connection may cut off what a slower rank has not read yet
        return value
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _resolve(task: Task) -> Callable[..., Any]:
    """The task's function. Test modules are often not importable by name: then they are loaded from their file."""
    module = sys.modules.get(task.module)
    if module is None or getattr(module, "__file__", None) != task.file:
        spec = importlib.util.spec_from_file_location(task.module, task.file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[task.module] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[task.module]
            raise
    function: Any = module
    for name in task.function.split("."):
        function = getattr(function, name)
    return function


@contextmanager
def _process_state(task: Task) -> Iterator[None]:
    """Gives the task torchrun's variables and a fixed random state; puts the process back afterwards."""
    environment, folder = dict(os.environ), os.getcwd()
    sys.path[:] = task.sys_path
    for prefix in ("", "LOCAL_"):
        os.environ[f"{prefix}RANK"] = str(task.rank)
        os.environ[f"{prefix}WORLD_SIZE"] = str(task.world_size)
    torch.manual_seed(0)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(False)
        _release_process_groups()


def _release_process_groups() -> None:
    """Drops what holds the meshes of the task that has ended: their process groups keep three threads each."""
    _clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()
    if hasattr(_redistribute, "clear_redistribute_planner_cache"):  # not in every torch that the package allows
        _redistribute.clear_redistribute_planner_cache()
    gc.collect()


def _pickled(error: BaseException) -> bytes:
    try:
        return pickle.dumps(error.with_traceback(None))
    except Exception:  # the traceback's text says it all; the exception itself is a convenience
        return b""


def _is_lost_connection(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, dist.DistNetworkError) or _LOST_CONNECTION.search(str(error)):
            return True
        error = error.__cause__
    return False
