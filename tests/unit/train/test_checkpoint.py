"""Checkpoints of one process: what is stored, what is refused, what a crash or a full disk leaves behind."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.errors import CheckpointError, StorageError
from moetrain.train import checkpoint
from moetrain.train.checkpoint import Checkpointer
from moetrain.train.faults import FaultError


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    stacked = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    tensors = {f"model.layers.0.ffn.experts.{e}.w_gate": stacked[e] for e in range(3)}
    tensors["model.embed"] = torch.randn(7, 4, generator=generator).bfloat16()
    tensors["model.bias"] = torch.randint(-9, 9, (6,), generator=generator)
    tensors["model.transposed"] = torch.randn(2, 3, generator=generator).T
    tensors["model.none"] = torch.zeros(0, 4)
    tensors["optim.embed.step"] = torch.tensor(float(seed))
    return tensors


def blank() -> dict[str, Tensor]:
    return {key: torch.full_like(tensor, 77) for key, tensor in state(0).items()}


def loaded(path: Path) -> dict[str, Tensor]:
    tensors = blank()
    checkpoint.load(path, tensors)
    return tensors


def assert_holds(path: Path | None, seed: int) -> None:
    assert path is not None
    for key, tensor in loaded(path).items():
        assert torch.equal(tensor, state(seed)[key]), key


def save(folder: Path, *steps: int, keep: int = 10, **settings: bool) -> None:
    with Checkpointer(folder, keep=keep, **settings) as checkpointer:
        for step in steps:
            checkpointer.save(step, state(step), {"position": step * 8})


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".step-")]


def chunk_of(path: Path, key: str) -> dict[str, int | str]:
    [chunk] = json.loads((path / "manifest.json").read_text())["tensors"][key]["chunks"]
    return chunk


def flip_bit(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("async_save", [False, True])
def test_what_is_saved_is_loaded(tmp_path: Path, async_save: bool) -> None:
    save(tmp_path, 5, async_save=async_save)
    path = checkpoint.latest(tmp_path)
    assert path == tmp_path / "step-00000005"
    assert_holds(path, 5)
    assert checkpoint.newest_good(tmp_path) == path
    assert hidden(tmp_path) == []


def test_loading_is_in_place_into_views_and_other_dtypes(tmp_path: Path) -> None:
    save(tmp_path, 5)
    stacked = torch.zeros(3, 4, 5, dtype=torch.float32, requires_grad=True)
    checkpoint.load(tmp_path / "step-00000005", {f"model.layers.0.ffn.experts.{e}.w_gate": stacked[e] for e in (0, 2)})
    expected = state(5)
    for e in (0, 2):
        assert torch.equal(stacked[e], expected[f"model.layers.0.ffn.experts.{e}.w_gate"].float())
    assert not stacked[1].any()


def test_the_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    info = {"position": 40, "loss": 0.1 + 0.2, "data": {"hash": "ab"}, "ids": [1, 2]}
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(123456789, state(5), info)
    found = checkpoint.read_info(tmp_path / "step-123456789")
    assert (found.step, found.info, found.world_size, found.torch_version) == (123456789, info, 1, torch.__version__)
    assert found.shapes == {key: tuple(tensor.shape) for key, tensor in state(5).items()}


def test_a_folder_without_checkpoints(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        assert checkpoint.latest(folder) is None
        assert checkpoint.newest_good(folder) is None
        with pytest.raises(CheckpointError, match="not a complete checkpoint"):
            checkpoint.read_info(folder)


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    save(tmp_path, 99999999, 100000000, 7)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-100000000"


# Damage


def test_a_flipped_bit_is_refused_with_the_tensors_name(tmp_path: Path) -> None:
    save(tmp_path, 5)
    path = tmp_path / "step-00000005"
    key = "model.layers.0.ffn.experts.1.w_gate"
    chunk = chunk_of(path, key)
    flip_bit(path / str(chunk["file"]), int(chunk["start"]) + int(chunk["length"]) // 2)
    for action in (checkpoint.verify, loaded):
        with pytest.raises(CheckpointError, match=rf"tensor {key} is damaged: .*{chunk['file']}"):
            action(path)


def test_damaged_tensors_are_not_loaded_in_part(tmp_path: Path) -> None:
    save(tmp_path, 5)
    path = tmp_path / "step-00000005"
    chunk = chunk_of(path, "optim.embed.step")
    flip_bit(path / str(chunk["file"]), int(chunk["start"]))
    tensors = blank()
    with pytest.raises(CheckpointError):
        checkpoint.load(path, tensors)
    assert all((tensor == 77).all() for tensor in tensors.values())


def truncate(path: Path) -> None:
    os.truncate(path / "__0_0.distcp", (path / "__0_0.distcp").stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path / "__0_0.distcp", 0)


def swap_with_another_step(path: Path) -> None:
    shutil.copy(path.parent / "step-00000005" / "__0_0.distcp", path / "__0_0.distcp")


def swap_index(path: Path) -> None:
    shutil.copy(path.parent / "step-00000005" / ".metadata", path / ".metadata")


def remove_shard(path: Path) -> None:
    (path / "__0_0.distcp").unlink()


def remove_index(path: Path) -> None:
    (path / ".metadata").unlink()


def change_info(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"position": 48', '"position": 49'))


def cut_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 100)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"tensor \S+ is cut off: __0_0.distcp has"),
        (empty, r"tensor \S+ is cut off: __0_0.distcp has 0 bytes"),
        (swap_with_another_step, r"tensor \S+ is damaged"),
        (swap_index, r"the index is damaged: .*\.metadata"),
        (remove_shard, r"tensor \S+ cannot be read from __0_0.distcp: No such file"),
        (remove_index, r"the index cannot be read from .metadata: No such file"),
        (change_info, r"manifest.json is damaged"),
        (cut_manifest, r"manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_taken(
    tmp_path: Path, damage: Callable[[Path], None], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 5, 6)
    damage(tmp_path / "step-00000006")
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path / "step-00000006")
    with caplog.at_level(logging.WARNING):
        assert_holds(checkpoint.newest_good(tmp_path), 5)
    assert "skipped a damaged checkpoint" in caplog.text
    shutil.rmtree(tmp_path / "step-00000005")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.newest_good(tmp_path)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5, 6)
    (tmp_path / "step-00000006" / "manifest.json").unlink()
    assert checkpoint.latest(tmp_path) == checkpoint.newest_good(tmp_path) == tmp_path / "step-00000005"


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    save(tmp_path, 5)
    manifest = tmp_path / "step-00000005" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 2}))
    with pytest.raises(CheckpointError, match="written in format 2; this version reads format 1"):
        loaded(tmp_path / "step-00000005")


# Another model


def test_missing_keys_and_other_shapes_are_named(tmp_path: Path) -> None:
    save(tmp_path, 5)
    path = tmp_path / "step-00000005"
    with pytest.raises(CheckpointError, match="does not have model.layers.1.w: it belongs to another model"):
        checkpoint.load(path, blank() | {"model.layers.1.w": torch.zeros(1)})
    tensors = blank() | {"model.embed": torch.full((7, 5), 77.0)}
    with pytest.raises(CheckpointError, match=r"model.embed \(7, 4\) instead of \(7, 5\)"):
        checkpoint.load(path, tensors)
    assert all((tensor == 77).all() for tensor in tensors.values())


def test_unused_tensors_are_refused_where_all_must_be_used(tmp_path: Path) -> None:
    save(tmp_path, 5)
    path = tmp_path / "step-00000005"
    tensors = blank()
    del tensors["model.bias"]
    checkpoint.load(path, tensors)
    with pytest.raises(CheckpointError, match="also has model.bias"):
        checkpoint.load(path, tensors, complete=True)
    checkpoint.load(path, blank(), complete=True)


# Which ones are kept


def test_old_checkpoints_are_pruned(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 10, keep=2)
    assert steps(tmp_path) == [3, 10]
    assert hidden(tmp_path) == []


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.save(5, state(1), {})
        checkpointer.save(5, state(2), {})
    assert_holds(tmp_path / "step-00000005", 2)
    assert hidden(tmp_path) == []


def test_after_a_fallback_the_damaged_newer_one_neither_counts_nor_is_lost(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    truncate(tmp_path / "step-00000020")
    save(tmp_path, 15, keep=1)
    assert steps(tmp_path) == [15, 20]
    assert_holds(checkpoint.newest_good(tmp_path), 15)
    save(tmp_path, 20, keep=1)
    assert steps(tmp_path) == [20]
    assert_holds(checkpoint.newest_good(tmp_path), 20)


# Asynchronous


def test_an_asynchronous_save_is_independent_of_later_updates_in_place(tmp_path: Path) -> None:
    tensors = state(5)
    with Checkpointer(tmp_path, keep=2, async_save=True) as checkpointer:
        assert not checkpointer.pending_done()
        checkpointer.save(5, tensors, {"note": "first"})
        for tensor in tensors.values():
            tensor.zero_()
        assert checkpoint.latest(tmp_path) is None
        checkpointer.commit()
        assert_holds(checkpoint.latest(tmp_path), 5)
        with pytest.raises(RuntimeError, match="no checkpoint is pending"):
            checkpointer.commit()


def test_the_writers_thread_takes_the_gpu_of_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append((device, threading.current_thread().name)))
    save(tmp_path, 5, async_save=True)
    assert taken == [(3, "checkpoint_0")]


def test_an_asynchronous_save_is_done_in_the_background_and_committed_by_the_next(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=3, async_save=True) as checkpointer:
        checkpointer.save(5, state(5), {})
        assert checkpointer._pending is not None
        checkpointer._pending[1].result(timeout=30)
        assert checkpointer.pending_done()
        checkpointer.save(6, state(6), {})
        assert steps(tmp_path) == [5]
        checkpointer.finish()
        checkpointer.finish()
    assert steps(tmp_path) == [5, 6]
    assert_holds(tmp_path / "step-00000006", 6)


def test_asynchronous_and_synchronous_files_are_equal(tmp_path: Path) -> None:
    save(tmp_path / "sync", 5)
    save(tmp_path / "async", 5, async_save=True)
    files = [tmp_path / kind / "step-00000005" / "__0_0.distcp" for kind in ("sync", "async")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_failed_commit_on_leaving_still_lets_others_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="ckpt.rename at step 2"), Checkpointer(tmp_path, keep=1, async_save=True) as checkpointer:
        monkeypatch.setenv("MOETRAIN_FAULT", "ckpt.rename:0:2:raise")
        checkpointer.save(2, state(2), {})
    monkeypatch.delenv("MOETRAIN_FAULT")
    save(tmp_path, 3)


# One writer


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    first = Checkpointer(tmp_path, keep=1)
    with pytest.raises(CheckpointError, match=rf"{tmp_path} is being written by another run \(process {os.getpid()} on "):
        Checkpointer(tmp_path, keep=1)
    first.save(1, state(1), {})
    first.close()
    save(tmp_path, 2)


def test_a_killed_writer_does_not_hold_the_folder_even_if_its_child_lives_on(tmp_path: Path) -> None:
    ends = os.pipe()
    writer = os.fork()
    if writer == 0:
        Checkpointer(tmp_path, keep=1)
        child = os.fork()
        if child == 0:
            signal.pause()
        os.write(ends[1], b"%d" % child)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(writer, 0)[1]) == signal.SIGKILL
    child = int(os.read(ends[0], 20))
    try:
        save(tmp_path, 2)
    finally:
        os.kill(child, signal.SIGKILL)


# Crashes


def save_and_fail(folder: Path, fault: str, async_save: bool) -> None:
    checkpointer = Checkpointer(folder, keep=1, async_save=async_save)
    checkpointer.save(1, state(1), {})
    checkpointer.finish()
    os.environ["MOETRAIN_FAULT"] = fault
    checkpointer.save(2, state(2), {})
    checkpointer.finish()


POINTS = {"ckpt.begin": 1, "ckpt.shard": 1, "ckpt.manifest": 1, "ckpt.rename": 1, "ckpt.prune": 2}


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_leaves_a_good_checkpoint(tmp_path: Path, point: str, async_save: bool) -> None:
    writer = multiprocessing.get_context("fork").Process(target=save_and_fail, args=(tmp_path, f"{point}:0:2:kill", async_save))
    writer.start()
    writer.join(30)
    assert writer.exitcode == -9
    assert steps(tmp_path) == [POINTS[point]]
    assert_holds(checkpoint.newest_good(tmp_path), POINTS[point])
    assert checkpoint.newest_good(tmp_path) == checkpoint.latest(tmp_path)
    Checkpointer(tmp_path, keep=1).close()
    assert hidden(tmp_path) == []
    assert_holds(checkpoint.newest_good(tmp_path), POINTS[point])


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("point", ["ckpt.shard", "ckpt.manifest", "ckpt.rename"])
def test_an_error_while_saving_leaves_nothing_behind(tmp_path: Path, point: str, async_save: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpointer(tmp_path, keep=1, async_save=async_save) as checkpointer:
        checkpointer.save(1, state(1), {})
        monkeypatch.setenv("MOETRAIN_FAULT", f"{point}:0:2:raise")
        with pytest.raises((FaultError, RuntimeError), match=f"{point} at step 2 on rank 0"):
            checkpointer.save(2, state(2), {})
            checkpointer.finish()
        assert hidden(tmp_path) == []
        checkpointer.finish()
        assert_holds(checkpoint.newest_good(tmp_path), 1)
        checkpointer.save(3, state(3), {})
    assert_holds(checkpoint.newest_good(tmp_path), 3)


def test_a_crash_while_a_step_is_replaced_loses_nothing(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "step-00000005").rename(tmp_path / ".step-00000005.replaced")
    (tmp_path / ".step-00000005.0123").mkdir()
    Checkpointer(tmp_path, keep=1).close()
    assert hidden(tmp_path) == []
    assert_holds(checkpoint.newest_good(tmp_path), 5)


# The disk refuses


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("kilobytes", [300, 2000])
def test_a_full_disk(small_disk: Path, async_save: bool, kilobytes: int) -> None:
    with Checkpointer(small_disk, keep=5, async_save=async_save) as checkpointer:
        checkpointer.save(1, state(1), {})
        big = {"model.big": torch.zeros(kilobytes, 256)}
        with pytest.raises(StorageError, match=f"cannot write {small_disk}.*: No space left on device"):
            for step in range(2, 6):
                checkpointer.save(step, big, {})
            checkpointer.finish()
        assert hidden(small_disk) == []
        assert_holds(small_disk / "step-00000001", 1)
        for step in steps(small_disk)[1:]:
            shutil.rmtree(small_disk / f"step-{step:08d}")
        checkpointer.save(6, state(6), {})
    assert_holds(checkpoint.newest_good(small_disk), 6)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_to_sync(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, state(1), {})
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(StorageError, match=os.strerror(code)):
                checkpointer.save(2, state(2), {})
        assert hidden(tmp_path) == []
        assert_holds(checkpoint.newest_good(tmp_path), 1)
        checkpointer.save(3, state(3), {})
    assert_holds(checkpoint.newest_good(tmp_path), 3)
