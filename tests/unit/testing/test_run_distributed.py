"""run_distributed: results, the first real traceback, hangs, deaths, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from moetrain.testing import RankError, run_distributed


class Odd(Exception):
    """Cannot be rebuilt from its arguments alone, as pickle would."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def total(rank: int, world_size: int, scale: float, *, shift: float = 0.0) -> torch.Tensor:
    value = torch.tensor([rank * scale + shift])
    dist.all_reduce(value)
    return value


def process_id(rank: int, world_size: int) -> int:
    return os.getpid()


def leave_traces(rank: int, world_size: int) -> str | None:
    seen = os.environ.get("LEFT_BEHIND")
    os.environ["LEFT_BEHIND"] = "yes"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    return seen


def look_around(rank: int, world_size: int) -> tuple[str | None, str, str, torch.dtype, int]:
    return os.environ.get("LEFT_BEHIND"), os.environ["RANK"], os.environ["WORLD_SIZE"], torch.get_default_dtype(), torch.get_num_threads()


def fail_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(0.3)
        raise KeyError("the real cause")
    dist.barrier()


def fail_oddly(rank: int, world_size: int) -> None:
    raise Odd(1, 2)


def fail_one_after_the_other(rank: int, world_size: int) -> None:
    time.sleep(0.2 * (world_size - rank))
    raise ValueError(f"rank {rank}")


def hang_on_rank_0(rank: int, world_size: int) -> None:
    if rank == 0:
        time.sleep(1000)
    dist.barrier()


def stop_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()


def kill_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def exit_rank_0(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(0)
    dist.barrier()


def reshard(rank: int, world_size: int, num_groups_before: int) -> torch.Tensor:
    """A two-dimensional mesh whose groups have other names in each call."""
    for _ in range(num_groups_before):
        dist.new_group([0])
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    tensor = distribute_tensor(torch.arange(16.0).reshape(4, 4), mesh, [Shard(0), Shard(1)])
    return (tensor @ tensor).redistribute(mesh, [Replicate(), Shard(0)]).full_tensor()


def test_results_come_by_rank_and_arguments_arrive() -> None:
    assert run_distributed(total, 3, 2.0, shift=1.0) == [torch.tensor([9.0])] * 3
    assert run_distributed(total, 1, 2.0) == [torch.tensor([0.0])]


def test_workers_are_reused_and_a_call_is_cheap() -> None:
    first = run_distributed(process_id, 2)
    start = time.monotonic()
    assert run_distributed(process_id, 2) == first
    assert time.monotonic() - start < 1.0  # importing torch alone takes longer
    assert run_distributed(process_id, 1) == first[:1]


def test_tasks_do_not_see_each_other() -> None:
    assert run_distributed(leave_traces, 2) == [None, None]
    assert run_distributed(look_around, 2) == [(None, str(rank), "2", torch.float32, 1) for rank in range(2)]


def test_meshes_of_an_ended_call_are_forgotten() -> None:
    matrix = torch.arange(16.0).reshape(4, 4)
    for num_groups_before in (0, 3, 1):
        assert all(torch.equal(result, matrix @ matrix) for result in run_distributed(reshard, 4, num_groups_before))


def test_the_failed_rank_is_reported_not_the_ones_that_lost_their_connection() -> None:
    with pytest.raises(
        RankError, match=r"rank 1 of 2 failed:(.|\n)*fail_on_rank_1(.|\n)*KeyError: 'the real cause'(.|\n)*after it, rank 0"
    ) as caught:
        run_distributed(fail_on_rank_1, 2)
    assert caught.value.rank == 1
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_first_of_several_failures_is_reported() -> None:
    with pytest.raises(RankError, match=r"rank 2 of 3 failed") as caught:
        run_distributed(fail_one_after_the_other, 3)
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_exception_that_cannot_be_unpickled_still_shows_its_traceback() -> None:
    with pytest.raises(RankError, match=r"Odd: 1 and 2") as caught:
        run_distributed(fail_oddly, 1)
    assert caught.value.__cause__ is None


def test_a_hang_shows_the_stacks_and_the_pool_recovers() -> None:
    before = run_distributed(process_id, 2)
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 0, 1 of 2 did not finish within 1 s(.|\n)*hang_on_rank_0(.|\n)*rank 1:(.|\n)*barrier"):
        run_distributed(hang_on_rank_0, 2, timeout=1.0)
    assert time.monotonic() - start < 8.0
    after = run_distributed(process_id, 2)
    assert not set(before) & set(after)


def test_a_stopped_rank_is_named() -> None:
    with pytest.raises(RankError, match=r"rank 1:\n  \(stopped by a signal"):
        run_distributed(stop_rank_1, 2, timeout=1.0)


@pytest.mark.parametrize(
    ("function", "message", "rank"),
    [(kill_rank_1, "rank 1 of 2 was killed by SIGKILL", 1), (exit_rank_0, "rank 0 of 2 exited with status 0", 0)],
)
def test_a_dead_rank_is_named_and_replaced(function: object, message: str, rank: int) -> None:
    before = run_distributed(process_id, 2)
    with pytest.raises(RankError, match=message) as caught:
        run_distributed(function, 2)  # type: ignore[arg-type]
    assert caught.value.rank == rank
    after = run_distributed(process_id, 2)
    assert after[rank] != before[rank]
    assert after[1 - rank] == before[1 - rank]


def test_a_local_function_is_refused() -> None:
    with pytest.raises(ValueError, match="top-level function"):
        run_distributed(lambda rank, world_size: None, 1)


BUSY_PARENT = """
import sys
sys.path.insert(0, {folder!r})
import orphan_tasks
from moetrain.testing import run_distributed
print(*run_distributed(orphan_tasks.process_id, 2), flush=True)
run_distributed(orphan_tasks.sleep, 2)
"""
ORPHAN_TASKS = """
import os, time
def process_id(rank, world_size): return os.getpid()
def sleep(rank, world_size): time.sleep(1000)
"""


def test_no_orphans_when_the_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "orphan_tasks.py").write_text(ORPHAN_TASKS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen(
        [sys.executable, "-c", BUSY_PARENT.format(folder=str(tmp_path))], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5.0
    while any(_is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_is_running(pid) for pid in workers)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
