"""Checkpoints: logical tensors, written by all ranks, committed by one rename.

A checkpoint is a folder ``step-<step>`` of what ``torch.distributed.checkpoint`` (DCP) writes, plus
``manifest.json`` with a hash of every stored piece of every tensor. It knows no layout: a state is a flat dict
``{logical key: tensor}``. A key may be on its owner only (a plain tensor), on several ranks (replicated: stored
once) or on all (DTensor), and is read back into any number of ranks and any sharding.

Files go to a hidden folder that gets its name only when all of it is on the disk, so at every instant each
folder ``step-<step>`` is complete. DCP itself loads damaged bytes without an error; hence the hashes.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import socket
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from moetrain.errors import CheckpointError, MoetrainError, StorageError
from moetrain.storage import storage_errors, sync
from moetrain.train import faults

T = TypeVar("T")

FORMAT = 1
MANIFEST = "manifest.json"
INDEX = ".metadata"
"""DCP's own index, a pickle: never opened before its hash has been checked."""

_STEP_FOLDER = re.compile(r"step-(\d+)")
_READ_BYTES = 4 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself. info: as given to ``save``. shapes: full shape by logical key."""

    step: int
    info: dict[str, Any]
    world_size: int
    torch_version: str
    shapes: dict[str, tuple[int, ...]]


class Checkpointer:
    """Writes the checkpoints of one run into one folder; every method but ``pending_done`` and ``close`` is collective.

    keep: complete checkpoints to keep. Checkpoints of later steps than the one just saved are not counted and not
    touched: after a fallback to an earlier one they may be damaged; saving their step again replaces them.
    async_save: ``save`` returns once the state is copied to host memory; a thread with a process group of its own
    writes it. It becomes a checkpoint when ``commit`` (or the next ``save``, or ``finish``) has been called.
    timeout_seconds: a rank that is waited for longer than this while saving is an error.

    Raises CheckpointError if another process writes into the folder, StorageError if the disk refuses.
    """

    def __init__(self, folder: Path, *, keep: int, async_save: bool = False, timeout_seconds: float = 1800.0) -> None:
        self.folder = folder
        self.keep = keep
        is_distributed = dist.is_available() and dist.is_initialized()
        # One group for the whole run, used by one thread at a time: two saves in flight would deadlock.
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds)) if is_distributed else None
        self._team = _Team(group)
        self._writer = ThreadPoolExecutor(1, "checkpoint", initializer=_same_gpu()) if async_save else None
        self._pending: tuple[_Draft, Future[list[_Chunk]]] | None = None
        self._lock: IO[str] | None = None
        self._team.lead(self._open)

    def save(self, step: int, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Write the state after ``step``; first finishes a pending save.

        tensors: this rank's part of the state. info: JSON values; rank 0's are stored.
        Raises StorageError on all ranks if the disk refuses on any; earlier checkpoints are intact and the next
        ``save`` may succeed. A failed asynchronous save raises where it is committed.
        """
        self.finish()
        faults.point("ckpt.begin", step)
        draft = self._team.lead(partial(self._begin, step, info))
        if self._writer is None:
            self._commit(draft, partial(self._write, draft, tensors))
        else:
            staged = _host_copy(tensors)
            self._pending = draft, self._writer.submit(self._write, draft, staged)

    def pending_done(self) -> bool:
        """Whether a save is pending that this rank has written completely. Local: ranks may differ for a while."""
        return self._pending is not None and self._pending[1].done()

    def commit(self) -> None:
        """Make the pending save a checkpoint; waits until all ranks have written their part."""
        if self._pending is None:
            raise RuntimeError("no checkpoint is pending")
        draft, written = self._pending
        self._pending = None
        self._commit(draft, written.result)

    def finish(self) -> None:
        """Commit the pending save, if there is one."""
        if self._pending is not None:
            self.commit()

    def close(self) -> None:
        """Let others write into the folder. Local; abandons a pending save."""
        if self._writer is not None:
            self._writer.shutdown(wait=False, cancel_futures=True)
        if self._lock is not None:
            _held_locks.discard(self._lock)
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self.close()

    def _open(self) -> None:
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _take_lock(self.folder)
            for path in self.folder.glob(".step-*"):
                final = self.folder / path.name[1:].partition(".")[0]
                if path.suffix == ".replaced" and not final.exists():
                    path.rename(final)
                else:
                    shutil.rmtree(path)

    def _begin(self, step: int, info: Mapping[str, Any]) -> _Draft:
        draft = _Draft(step, self.folder / f".{_name(step)}.{uuid.uuid4().hex}", json.dumps(info))
        with storage_errors(self.folder):
            draft.folder.mkdir()
        return draft

    def _write(self, draft: _Draft, tensors: Mapping[str, Tensor]) -> list[_Chunk]:
        """Write this rank's part; the pieces of it with their hashes. Runs in the writer's thread if there is one."""
        try:
            with _single_process_is_fine(self._team):
                metadata = dcp.save(dict(tensors), storage_writer=_Writer(draft), process_group=self._team.group)
        except CheckpointException as error:
            raise _cause(error) from error
        with storage_errors(draft.folder):
            return list(_chunks(draft.folder, metadata, prefix=f"__{self._team.rank}_"))

    def _commit(self, draft: _Draft, written: Callable[[], list[_Chunk]]) -> None:
        try:
            parts = self._team.gather(written)
            self._team.lead(partial(self._publish, draft, [chunk for part in parts for chunk in part]))
        except Exception:
            if self._team.rank == 0:
                shutil.rmtree(draft.folder, ignore_errors=True)
            raise

    def _publish(self, draft: _Draft, chunks: list[_Chunk]) -> None:
        final = self.folder / _name(draft.step)
        replaced = self.folder / f".{final.name}.replaced"
        with storage_errors(self.folder):
            faults.point("ckpt.manifest", draft.step)
            _write_manifest(draft, chunks, self._team.size)
            faults.point("ckpt.rename", draft.step)
            if final.exists():
                final.rename(replaced)
            draft.folder.rename(final)
            sync(self.folder)
            shutil.rmtree(replaced, ignore_errors=True)
            earlier = [path for step, path in _complete(self.folder) if step <= draft.step]
            for path in earlier[: -self.keep]:
                # Hidden first: half of a checkpoint must never be found under a checkpoint's name.
                hidden = path.rename(self.folder / f".{path.name}.pruned")
                faults.point("ckpt.prune", draft.step)
                shutil.rmtree(hidden)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in the folder, its tensors unverified. Local."""
    paths = [path for _, path in _complete(folder)]
    return paths[-1] if paths else None


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint in the folder that verifies, None if there is no complete one. Collective.

    Warns about the damaged ones that it skips. Raises CheckpointError if there are only damaged ones: starting
    afresh in their place is not for us to decide.
    """
    team = _Team(None)
    reasons = []
    for _, path in reversed(team.lead(partial(_step_folders, folder))):
        if not (path / MANIFEST).exists():
            continue
        try:
            verify(path)
        except CheckpointError as error:
            reasons.append(str(error))
            if team.rank == 0:
                log.warning("skipped a damaged checkpoint: %s", error)
        else:
            return path
    if reasons:
        raise CheckpointError(f"{folder} has no undamaged checkpoint: {'; '.join(reasons)}")
    return None


def read_info(path: Path) -> CheckpointInfo:
    """What the checkpoint says of itself. Local. Raises CheckpointError if ``path`` is not a complete checkpoint."""
    manifest = _read_manifest(path)
    shapes = {key: tuple(tensor["shape"]) for key, tensor in manifest["tensors"].items()}
    return CheckpointInfo(manifest["step"], manifest["info"], manifest["world_size"], manifest["torch"], shapes)


def verify(path: Path) -> None:
    """Check every stored byte against its hash. Collective: the ranks share the work, and all learn of a failure.

    Raises CheckpointError naming the tensor and the file.
    """
    team = _Team(None)
    team.gather(partial(_verify_share, path, team.rank, team.size))


def load(path: Path, tensors: Mapping[str, Tensor], *, complete: bool = False, verified: bool = False) -> None:
    """Read into the given tensors, in place. Collective; each rank offers the keys it wants, in its own sharding.

    tensors: plain tensors of the full shape, or DTensors; another dtype than the stored one is converted to.
    complete: a stored tensor that no rank asks for is an error, as a resumed run wants it.
    verified: ``newest_good`` or ``verify`` has just checked this checkpoint.

    Raises CheckpointError on all ranks for a damaged checkpoint, missing keys or other shapes. Nothing has been
    changed then.
    """
    team = _Team(None)
    if not verified:
        verify(path)
    team.gather(partial(_check_fit, path, tensors))
    if complete:
        team.lead(partial(_check_complete, path, team.gather(lambda: set(tensors))))
    try:
        with _single_process_is_fine(team):
            dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(path))
    except CheckpointException as error:
        raise CheckpointError(f"{path} cannot be loaded: {_cause(error)}") from error


@dataclass(frozen=True)
class _Draft:
    """A checkpoint that is being written into a hidden folder. info: JSON text."""

    step: int
    folder: Path
    info: str


@dataclass(frozen=True)
class _Chunk:
    """One stored piece of a tensor: the block at ``offsets`` of ``sizes``, in ``length`` bytes of a file from ``start``."""

    key: str
    shape: list[int]
    dtype: str
    offsets: list[int]
    sizes: list[int]
    file: str
    start: int
    length: int
    xxh3_64: str


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, with a refusing disk reported as what it is."""

    def __init__(self, draft: _Draft) -> None:
        super().__init__(draft.folder, sync_files=True, overwrite=False)
        self._draft = draft

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        with storage_errors(self._draft.folder):
            results = super().write_data(plan, planner)
        faults.point("ckpt.shard", self._draft.step)
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        with storage_errors(self._draft.folder):
            super().finish(metadata, results)


class _Team:
    """The ranks that save or load together; without a process group, this process alone."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        is_distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if is_distributed else 0
        self.size = dist.get_world_size(group) if is_distributed else 1

    def gather(self, action: Callable[[], T]) -> list[T]:
        """What ``action`` returns on each rank, on rank 0; an empty list on the others.

        If it fails on any rank all of them raise: StorageError or CheckpointError if one of that kind is among
        the failures, else RuntimeError.
        """
        if self.size == 1:
            return [action()]
        value, failure = None, None
        try:
            value = action()
        except Exception as error:
            failure = error
        outcomes: list[Any] = [None] * self.size
        dist.gather_object((_summary(failure), value), outcomes if self.rank == 0 else None, group=self.group, group_dst=0)
        failures = self._from_lead({rank: summary for rank, (summary, _) in enumerate(outcomes) if summary} if self.rank == 0 else {})
        if failures:
            raise _joint_error(failures) from failure
        return [value for _, value in outcomes] if self.rank == 0 else []

    def lead(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on rank 0, where alone it runs, on all ranks; fails on all if it fails there."""
        if self.size == 1:
            return action()
        values = self.gather(action if self.rank == 0 else lambda: None)
        return self._from_lead(values[0] if self.rank == 0 else None)

    def _from_lead(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]


def _summary(error: Exception | None) -> tuple[type[Exception], str] | None:
    if error is None:
        return None
    for kind in (StorageError, CheckpointError):
        if isinstance(error, kind):
            return kind, str(error)
    return RuntimeError, f"{type(error).__name__}: {error}"


def _joint_error(failures: dict[int, tuple[type[Exception], str]]) -> Exception:
    """The failure to report when several ranks failed: a refusing disk explains more than what follows from it."""
    order = (StorageError, CheckpointError, RuntimeError)
    rank, (kind, message) = min(failures.items(), key=lambda item: (order.index(item[1][0]), item[0]))
    return kind(message if issubclass(kind, MoetrainError) else f"rank {rank}: {message}")


def _cause(error: CheckpointException) -> Exception:
    """DCP's exception is not an Exception and holds those of several ranks: the one to report."""
    causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        if isinstance(cause, StorageError):
            return cause
    return RuntimeError(str(error))


@contextmanager
def _single_process_is_fine(team: _Team) -> Iterator[None]:
    """DCP warns when it runs without a process group."""
    if dist.is_available() and dist.is_initialized():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _host_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in host memory, independent of later updates in place."""
    # torch 2.13's stager takes a DTensor over a view that does not begin its storage for a plain tensor, and fails
    views = {key: tensor for key, tensor in tensors.items() if isinstance(tensor, DTensor) and tensor.to_local().storage_offset()}
    stager = DefaultStager(StagingOptions(False, False, False, False))
    try:
        staged = stager.stage({key: tensor for key, tensor in tensors.items() if key not in views})
    finally:
        stager.close()
    assert isinstance(staged, dict)
    # not by DTensor.from_local, which would move the copy back to the mesh's device
    copies = {key: DTensor(t.to_local().to("cpu", copy=True), t._spec, requires_grad=False) for key, t in views.items()}
    return {**staged, **copies}


def _same_gpu() -> Callable[[], None]:
    """For a thread to begin with: the GPU of this one. Threads start with the first GPU of the machine; DCP synchronises the
    current one, also when all tensors are in host memory, which would take some hundred MB there for each rank."""
    if not torch.cuda.is_initialized():
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


_held_locks: set[IO[str]] = set()


def _drop_inherited_locks() -> None:
    # A lock belongs to the open file, which a forked child (a data loader's worker) shares: the child would hold
    # it on after the trainer has been killed.
    for file in _held_locks:
        file.close()
    _held_locks.clear()


os.register_at_fork(after_in_child=_drop_inherited_locks)


def _take_lock(folder: Path) -> IO[str]:
    """Exclusive lock on the folder; the kernel releases it when the process ends, however it ends."""
    file = open(folder / ".lock", "a+")  # noqa: SIM115 - open as long as the lock is held
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read()
        file.close()
        raise CheckpointError(f"{folder} is being written by another run ({holder}); stop it, or choose another run.dir") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _held_locks.add(file)
    return file


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Folders that have a checkpoint's name, by step."""
    if not folder.is_dir():
        return []
    matches = ((_STEP_FOLDER.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def _complete(folder: Path) -> list[tuple[int, Path]]:
    """Folders that hold a checkpoint with a sound manifest, by step."""
    complete = []
    for step, path in _step_folders(folder):
        try:
            _read_manifest(path)
        except CheckpointError:
            continue
        complete.append((step, path))
    return complete


def _hash(data: Iterable[bytes]) -> str:
    import xxhash

    digest = xxhash.xxh3_64()
    for piece in data:
        digest.update(piece)
    return digest.hexdigest()


def _read(path: Path, start: int, length: int) -> Iterator[bytes]:
    """Bytes of a file in pieces, fewer than ``length`` if it ends before."""
    with open(path, "rb") as file:
        file.seek(start)
        while length > 0 and (piece := file.read(min(length, _READ_BYTES))):
            length -= len(piece)
            yield piece


def _chunks(folder: Path, metadata: Metadata, *, prefix: str) -> Iterator[_Chunk]:
    """The pieces that are stored in files whose names begin with ``prefix``."""
    for index, place in metadata.storage_data.items():
        if not place.relative_path.startswith(prefix):
            continue
        tensor = metadata.state_dict_metadata[index.fqn]
        assert isinstance(tensor, TensorStorageMetadata), f"{index.fqn} is not a tensor"
        sizes = next(list(chunk.sizes) for chunk in tensor.chunks if index.offset in (None, chunk.offsets))
        yield _Chunk(
            key=index.fqn,
            shape=list(tensor.size),
            dtype=str(tensor.properties.dtype).removeprefix("torch."),
            offsets=list(index.offset or [0] * len(tensor.size)),
            sizes=sizes,
            file=place.relative_path,
            start=place.offset,
            length=place.length,
            xxh3_64=_hash(_read(folder / place.relative_path, place.offset, place.length)),
        )


def _write_manifest(draft: _Draft, chunks: list[_Chunk], world_size: int) -> None:
    tensors: dict[str, Any] = {}
    for chunk in sorted(chunks, key=lambda chunk: (chunk.key, chunk.offsets)):
        tensor = tensors.setdefault(chunk.key, {"dtype": chunk.dtype, "shape": chunk.shape, "chunks": []})
        tensor["chunks"].append({name: getattr(chunk, name) for name in ("offsets", "sizes", "file", "start", "length", "xxh3_64")})
    index = draft.folder / INDEX
    length = index.stat().st_size
    manifest = {
        "format": FORMAT,
        "step": draft.step,
        "info": json.loads(draft.info),
        "world_size": world_size,
        "torch": str(torch.__version__),
        "index": {"file": INDEX, "start": 0, "length": length, "xxh3_64": _hash(_read(index, 0, length))},
        "tensors": tensors,
    }
    manifest["xxh3_64"] = _manifest_hash(manifest)
    with open(draft.folder / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync(draft.folder)


def _manifest_hash(manifest: Mapping[str, Any]) -> str:
    """Hash of everything in the manifest but this hash."""
    content = {key: value for key, value in manifest.items() if key != "xxh3_64"}
    return _hash([json.dumps(content, sort_keys=True).encode()])


def _read_manifest(path: Path) -> dict[str, Any]:
    """Raises CheckpointError if it is missing, damaged or of another format."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}/{MANIFEST} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise CheckpointError(f"{path}/{MANIFEST} is not a checkpoint's manifest")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path} was written in format {manifest['format']}; this version reads format {FORMAT}")
    if manifest.get("xxh3_64") != _manifest_hash(manifest):
        raise CheckpointError(f"{path}/{MANIFEST} is damaged: it does not match its own hash")
    return manifest


def _verify_share(path: Path, rank: int, size: int) -> None:
    manifest = _read_manifest(path)
    _verify_bytes(path, "the index", manifest["index"])
    chunks = [(f"tensor {key}", chunk) for key, tensor in manifest["tensors"].items() for chunk in tensor["chunks"]]
    for what, chunk in chunks[rank::size]:
        _verify_bytes(path, what, chunk)


def _verify_bytes(path: Path, what: str, stored: Mapping[str, Any]) -> None:
    file = path / stored["file"]
    try:
        found = _hash(_read(file, stored["start"], stored["length"]))
        size = file.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: {what} cannot be read from {file.name}: {error.strerror}") from error
    end = stored["start"] + stored["length"]
    if size < end:
        raise CheckpointError(f"{path}: {what} is cut off: {file.name} has {size} bytes, it needs {end}")
    if found != stored["xxh3_64"]:
        raise CheckpointError(f"{path}: {what} is damaged: bytes {stored['start']} to {end} of {file.name} do not match their hash")


def _check_fit(path: Path, tensors: Mapping[str, Tensor]) -> None:
    shapes = read_info(path).shapes
    missing = sorted(tensors.keys() - shapes.keys())
    if missing:
        raise CheckpointError(f"{path} does not have {_some(missing)}: it belongs to another model")
    wrong = [
        f"{key} {shapes[key]} instead of {tuple(tensor.shape)}"
        for key, tensor in sorted(tensors.items())
        if shapes[key] != tuple(tensor.shape)
    ]
    if wrong:
        raise CheckpointError(f"{path} has other shapes: {_some(wrong)}: it belongs to another model")


def _check_complete(path: Path, asked_for: list[set[str]]) -> None:
    unused = sorted(read_info(path).shapes.keys() - set().union(*asked_for))
    if unused:
        raise CheckpointError(f"{path} also has {_some(unused)}: it belongs to another model")


def _some(items: list[str]) -> str:
    shown = ", ".join(items[:5])
    return shown if len(items) <= 5 else f"{shown} and {len(items) - 5} more"
