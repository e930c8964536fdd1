"""Checkpoints of several ranks: any owner map and sharding, and failures that all ranks learn of."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from moetrain.errors import CheckpointError, StorageError
from moetrain.testing import RankError, run_distributed
from moetrain.train import checkpoint
from moetrain.train.checkpoint import Checkpointer

NUM_EXPERTS = 5


def full_state(seed: int) -> dict[str, Tensor]:
    """dense.*: DTensors in the runs, with rows that no number of ranks divides; experts.*: on their owners only."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"model.dense.w": torch.randn(7, 6, generator=generator, dtype=torch.float64)}
    tensors["model.dense.few"] = torch.randn(2, 3, generator=generator)  # fewer rows than ranks
    tensors["optim.dense.step"] = torch.tensor(float(seed))  # replicated plain tensor
    for e in range(NUM_EXPERTS):
        tensors[f"model.experts.{e}.w"] = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        tensors[f"optim.experts.{e}.w.exp_avg"] = torch.randn(4, 3, generator=generator)
    return tensors


def place(full: dict[str, Tensor], rank: int, owners: list[int], placements: list[Placement]) -> dict[str, Tensor]:
    """This rank's part: experts by the owner map, dense weights sharded, counters on every rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),) if len(placements) == 1 else (2, dist.get_world_size() // 2))
    part = {}
    for key, tensor in full.items():
        if ".dense." in key:
            part[key] = distribute_tensor(tensor, mesh, placements, src_data_rank=None) if tensor.dim() else tensor.clone()
        elif owners[int(key.split(".")[2])] == rank:
            part[key] = tensor.clone()
    return part


def owners_of(world_size: int) -> list[int]:
    """Rank 0 owns none where there are others."""
    return [1 + e % (world_size - 1) if world_size > 1 else 0 for e in range(NUM_EXPERTS)]


def save(
    rank: int, world_size: int, folder: Path, steps: list[int], placements: list[Placement], *, keep: int = 3, async_save: bool = False
) -> None:
    with Checkpointer(folder, keep=keep, async_save=async_save) as checkpointer:
        for step in steps:
            part = place(full_state(step), rank, owners_of(world_size), placements)
            checkpointer.save(step, part, {"step": step})
            for tensor in part.values():
                tensor.zero_()


def load(rank: int, world_size: int, folder: Path, owners: list[int], placements: list[Placement]) -> tuple[int, dict[str, Tensor]]:
    """Step of the newest good checkpoint, and what this rank has of it, gathered."""
    path = checkpoint.newest_good(folder)
    assert path is not None
    part = place({key: torch.full_like(tensor, 77) for key, tensor in full_state(0).items()}, rank, owners, placements)
    checkpoint.load(path, part, complete=True, verified=True)
    whole = {key: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for key, tensor in part.items()}
    return checkpoint.read_info(path).step, whole


def assert_loads(folder: Path, step: int, world_size: int, owners: list[int], placements: list[Placement]) -> None:
    expected = full_state(step)
    seen = set()
    for found, tensors in run_distributed(load, world_size, folder, owners, placements):
        assert found == step
        for key, tensor in tensors.items():
            assert torch.equal(tensor, expected[key]), key
        seen |= tensors.keys()
    assert seen == expected.keys()


@pytest.mark.parametrize("async_save", [False, True])
def test_four_ranks_save_and_any_number_loads_with_other_owners(tmp_path: Path, async_save: bool) -> None:
    run_distributed(save, 4, tmp_path, [3, 8], [Shard(0)], async_save=async_save)
    info = checkpoint.read_info(tmp_path / "step-00000008")
    assert (info.world_size, info.info) == (4, {"step": 8})
    assert_loads(tmp_path, 8, 4, [3, 3, 0, 2, 2], [Shard(0), Shard(1)])
    assert_loads(tmp_path, 8, 2, [0, 1, 0, 1, 0], [Shard(1)])
    assert_loads(tmp_path, 8, 1, [0] * NUM_EXPERTS, [Replicate()])


def test_two_ranks_save_in_two_dimensions_and_one_process_loads_without_a_group(tmp_path: Path) -> None:
    run_distributed(save, 2, tmp_path, [3], [Shard(1), Shard(0)])
    tensors = {key: torch.zeros_like(tensor) for key, tensor in full_state(0).items()}
    checkpoint.load(tmp_path / "step-00000003", tensors, complete=True)
    assert all(torch.equal(tensor, full_state(3)[key]) for key, tensor in tensors.items())


def test_one_process_saves_without_a_group_and_two_ranks_load(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(3, full_state(3), {})
    assert_loads(tmp_path, 3, 2, [1] * NUM_EXPERTS, [Shard(0)])


def test_old_checkpoints_are_pruned(tmp_path: Path) -> None:
    run_distributed(save, 2, tmp_path, [1, 2, 3, 4], [Shard(0)], keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step-00000003", "step-00000004"]


def errors_of(rank: int, world_size: int, folder: Path, offered: dict[int, dict[str, Tensor]]) -> tuple[str, str]:
    """Kind and message with which loading fails on this rank."""
    try:
        checkpoint.load(folder, offered[rank])
    except CheckpointError as error:
        return type(error).__name__, str(error)
    return "none", ""


def test_a_flipped_bit_is_refused_on_all_ranks_with_the_tensors_name(tmp_path: Path) -> None:
    run_distributed(save, 2, tmp_path, [3, 4], [Shard(0)])
    path = tmp_path / "step-00000004"
    [chunk] = json.loads((path / "manifest.json").read_text())["tensors"]["model.experts.2.w"]["chunks"]
    with open(path / chunk["file"], "r+b") as file:
        file.seek(chunk["start"] + chunk["length"] // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    for kind, message in run_distributed(errors_of, 2, path, {0: {}, 1: {}}):
        assert kind == "CheckpointError"
        assert "tensor model.experts.2.w is damaged" in message
        assert chunk["file"] in message
    assert_loads(tmp_path, 3, 2, [0] * NUM_EXPERTS, [Shard(0)])


def test_what_does_not_fit_on_one_rank_is_refused_on_all(tmp_path: Path) -> None:
    run_distributed(save, 2, tmp_path, [3], [Shard(0)])
    good = {"model.experts.1.w": torch.zeros(4, 3, dtype=torch.float64)}
    for bad, text in (
        ({"model.experts.9.w": torch.zeros(1)}, "model.experts.9.w"),
        ({"model.experts.1.w": torch.zeros(3)}, "(4, 3) instead of (3,)"),
    ):
        for kind, message in run_distributed(errors_of, 2, tmp_path / "step-00000003", {0: good, 1: bad}):
            assert kind == "CheckpointError"
            assert text in message


def save_on_a_full_disk(rank: int, world_size: int, folder: Path, async_save: bool) -> tuple[str, str, list[str]]:
    """The disk of rank 1 alone refuses the second checkpoint, and has space again for the third."""
    with Checkpointer(folder, keep=5, async_save=async_save) as checkpointer:
        checkpointer.save(1, place(full_state(1), rank, owners_of(world_size), [Shard(0)]), {})
        checkpointer.finish()
        sync = os.fsync
        if rank == 1:
            os.fsync = refuse
        try:
            checkpointer.save(2, place(full_state(2), rank, owners_of(world_size), [Shard(0)]), {})
            checkpointer.finish()
            kind, message = "none", ""
        except StorageError as error:
            kind, message = "StorageError", str(error)
        finally:
            os.fsync = sync
        dist.barrier()
        left = sorted(path.name for path in folder.iterdir())
        dist.barrier()  # the next save makes a folder
        checkpointer.save(3, place(full_state(3), rank, owners_of(world_size), [Shard(0)]), {})
    return kind, message, left


def refuse(fd: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_on_one_rank_is_an_error_on_all_and_leaves_the_earlier_checkpoint(tmp_path: Path, async_save: bool) -> None:
    for kind, message, left in run_distributed(save_on_a_full_disk, 2, tmp_path, async_save):
        assert kind == "StorageError"
        assert "No space left on device" in message
        assert left == [".lock", "step-00000001"]
    assert_loads(tmp_path, 3, 1, [0] * NUM_EXPERTS, [Replicate()])


def save_with_fault(rank: int, world_size: int, folder: Path, fault: str, async_save: bool) -> None:
    with Checkpointer(folder, keep=1, async_save=async_save) as checkpointer:
        for step in (1, 2):
            os.environ["MOETRAIN_FAULT"] = fault
            checkpointer.save(step, place(full_state(step), rank, owners_of(world_size), [Shard(0)]), {})


@pytest.mark.parametrize(
    ("point", "rank", "async_save", "good"),
    [("ckpt.begin", 1, False, 1), ("ckpt.shard", 1, True, 1), ("ckpt.rename", 0, False, 1), ("ckpt.prune", 0, True, 2)],
)
def test_a_killed_rank_leaves_a_good_checkpoint(tmp_path: Path, point: str, rank: int, async_save: bool, good: int) -> None:
    with pytest.raises(RankError, match=f"rank {rank} of 2 was killed by SIGKILL"):
        run_distributed(save_with_fault, 2, tmp_path, f"{point}:{rank}:2:kill", async_save)
    assert_loads(tmp_path, good, 1, [0] * NUM_EXPERTS, [Replicate()])
    run_distributed(save, 2, tmp_path, [7], [Shard(0)], keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step-00000007"]
    assert_loads(tmp_path, 7, 2, [1] * NUM_EXPERTS, [Shard(0)])


def open_twice(rank: int, world_size: int, folder: Path) -> Any:
    with Checkpointer(folder, keep=1):
        try:
            Checkpointer(folder, keep=1)
        except CheckpointError as error:
            return str(error)
    return None


def test_a_second_writer_is_refused_on_all_ranks(tmp_path: Path) -> None:
    for message in run_distributed(open_twice, 2, tmp_path):
        assert message is not None
        assert "is being written by another run" in message
