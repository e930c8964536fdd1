"""Run a function on several gloo ranks of this machine, for tests.

The ranks are processes of one pool that lives as long as the calling process: importing torch is paid once per
worker, a call itself costs some ten milliseconds. Each call has a process group of its own. What the caller sees
of a failure is the first rank that failed by itself, not one of those that lost their connection to it.
"""

from __future__ import annotations

import atexit
import itertools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moetrain.testing.worker import STACKS_SIGNAL, Report, Task

GRACE = 3.0
"""Seconds that the other ranks get to notice that one has failed."""


class RankError(RuntimeError):
    """A rank failed, died or hung. rank: which one (the lowest of those that hung)."""

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, **kwargs: Any) -> list[Any]:
    """``[fn(rank, world_size, *args, **kwargs) for each rank]``, run at once on ``world_size`` gloo ranks.

    fn: top-level function of a module (not of the main script); arguments and results must be picklable.
    timeout: seconds for the whole call; also the limit of a collective.

    Raises RankError with the traceback of the rank that failed first by itself (its exception is the cause),
    with the signal or exit status of a rank that died, or with the stacks of the ranks that hung.
    """
    return _pool().run(fn, world_size, pickle.dumps((args, kwargs)), timeout)


class _Worker:
    """A started process and the pipe to it."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        fds = (theirs.fileno(), self._stacks.fileno())
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; from moetrain.testing.worker import main; main({fds[0]}, {fds[1]}, {os.getpid()})"
        )
        self.process = subprocess.Popen([sys.executable, "-c", program], pass_fds=fds, stdin=subprocess.DEVNULL)
        theirs.close()
        self._is_ready = False

    def wait_until_ready(self, timeout: float) -> None:
        """Raises RuntimeError if the process did not come up."""
        if not self._is_ready:
            if not self.connection.poll(timeout):
                raise RuntimeError(f"a test worker did not start within {timeout:.0f} s")
            try:
                self.connection.recv()
            except (EOFError, ConnectionError):
                raise RuntimeError(f"a test worker {self.end()} while starting") from None
            self._is_ready = True

    def end(self) -> str:
        """How the process ended, as the end of a sentence."""
        status = self.process.wait()
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"

    def stacks(self) -> str:
        """The stacks of all its threads now."""
        if "T" in _process_state(self.process.pid):
            return "  (stopped by a signal: no stack)"
        start = self._stacks.seek(0, os.SEEK_END)
        self.process.send_signal(STACKS_SIGNAL)
        deadline, size = time.monotonic() + 2.0, start
        while time.monotonic() < deadline:
            time.sleep(0.05)
            before, size = size, self._stacks.seek(0, os.SEEK_END)
            if start < before == size:  # it has stopped growing
                break
        self._stacks.seek(start)
        return self._stacks.read().decode(errors="replace") or "  (no answer)"

    def close(self) -> None:
        self.connection.close()
        self._stacks.close()
        self.process.kill()
        self.process.wait()


class _Pool:
    """The workers of this process, worker ``i`` is rank ``i`` of every call that has as many ranks."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self._calls = itertools.count()

    def run(self, fn: Callable[..., Any], world_size: int, call: bytes, timeout: float) -> list[Any]:
        if fn.__module__ == "__main__" or "<locals>" in fn.__qualname__:
            raise ValueError(f"{fn.__qualname__} must be a top-level function of a module, so that workers can import it")
        workers = self._ready(world_size)
        prefix = f"call-{next(self._calls)}"
        file = sys.modules[fn.__module__].__file__
        assert file is not None
        for rank, worker in enumerate(workers):
            # A collective's own limit is a little longer: a hang then shows the stack of every rank.
            task = Task(
                fn.__module__, file, fn.__qualname__, call, rank, world_size, self._store.port, prefix, timeout + 2 * GRACE, list(sys.path)
            )
            worker.connection.send(task)
        reports: dict[int, Report] = {}
        try:
            _collect(workers, reports, timeout)
            hung = {rank: worker.stacks() for rank, worker in enumerate(workers) if rank not in reports}
        finally:
            self._replace([rank for rank, worker in enumerate(workers) if rank not in reports or worker.process.poll() is not None])
        _raise_failure(reports, hung, world_size, timeout)
        return [pickle.loads(reports[rank].value) for rank in range(world_size)]

    def _ready(self, world_size: int) -> list[_Worker]:
        self._replace([index for index, worker in enumerate(self._workers) if worker.process.poll() is not None])
        self._workers += [_Worker() for _ in range(world_size - len(self._workers))]
        for worker in self._workers[:world_size]:
            worker.wait_until_ready(120.0)
        return self._workers[:world_size]

    def _replace(self, indices: list[int]) -> None:
        """Starts new workers without waiting for them: they import torch while the caller goes on."""
        for index in indices:
            self._workers[index].close()
            self._workers[index] = _Worker()

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


_the_pool: _Pool | None = None


def _pool() -> _Pool:
    global _the_pool
    if _the_pool is None:
        _the_pool = _Pool()
        atexit.register(_the_pool.close)
    return _the_pool


def _collect(workers: list[_Worker], reports: dict[int, Report], timeout: float) -> None:
    """Fills ``reports`` until every rank has reported or died, or time is up: all of it, or GRACE after a failure."""
    limit = time.monotonic() + timeout
    while len(reports) < len(workers) and time.monotonic() < limit:
        pending = {worker.connection: (rank, worker) for rank, worker in enumerate(workers) if rank not in reports}
        wait(list(pending), timeout=max(0.0, min(0.1, limit - time.monotonic())))
        for rank, worker in pending.values():
            # Not by the end of the pipe alone: a child that the worker has forked may hold it open.
            has_died = worker.process.poll() is not None
            try:
                if worker.connection.poll():
                    reports[rank] = worker.connection.recv()
                elif has_died:
                    reports[rank] = Report(rank, time.monotonic(), failure=worker.end(), died=True)
            except (EOFError, ConnectionError):
                reports[rank] = Report(rank, time.monotonic(), failure=worker.end(), died=True)
        if any(report.failure is not None for report in reports.values()):
            limit = min(limit, time.monotonic() + GRACE)


def _raise_failure(reports: dict[int, Report], hung: dict[int, str], world_size: int, timeout: float) -> None:
    failures = sorted((r for r in reports.values() if r.failure is not None), key=lambda r: (r.lost_connection, r.when))
    stacks = "".join(f"\nrank {rank}:\n{text}" for rank, text in hung.items())
    if not failures and not hung:
        return
    if not failures or (hung and failures[0].lost_connection):
        ranks = ", ".join(map(str, hung))
        raise RankError(f"rank {ranks} of {world_size} did not finish within {timeout:g} s; stacks:{stacks}", rank=min(hung))
    first = failures[0]
    assert first.failure is not None
    lines = [
        f"rank {first.rank} of {world_size} {first.failure}"
        if first.died
        else f"rank {first.rank} of {world_size} failed:\n{first.failure}"
    ]
    lines += [f"after it, rank {r.rank}: {r.failure.strip().splitlines()[-1]}" for r in failures[1:] if r.failure]
    if hung:
        lines.append(f"rank {', '.join(map(str, hung))} did not notice within {GRACE:g} s and was killed; stacks:{stacks}")
    raise RankError("\n".join(lines), rank=first.rank) from _unpickled(first.error)


def _unpickled(error: bytes) -> BaseException | None:
    try:
        return pickle.loads(error) if error else None
    except Exception:  # an exception whose class needs more than its arguments; the message has its traceback
        return None


def _process_state(pid: int) -> str:
    """The state letter that the kernel gives a process ("" where it cannot be asked)."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.read_text().rpartition(")")[2].split()[0] if stat.exists() else ""
