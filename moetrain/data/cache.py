"""The shared cache: tokenizers and packed data, by content hash.

An entry is built in a folder beside its place and appears by rename, so a half-written one is never seen.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moetrain.errors import DataError
from moetrain.storage import cache_dir, sync

CHUNK_BYTES = 1 << 24
"""Read at a time from a file that may not fit in memory."""


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Exclusive lock among the processes that share the cache; released also when its holder is killed."""
    path = cache_dir() / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def new_entry(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` if the block ends without an error. The caller holds the entry's lock."""
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync(temporary)
        temporary.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def file_chunks(path: Path) -> Iterator[bytes]:
    """The content of an input file, piece by piece. Raises DataError if it cannot be read."""
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def hash_file(digest: Any, path: Path) -> None:
    """Update an ``xxhash`` digest with the content of a file. Raises DataError if it cannot be read."""
    for chunk in file_chunks(path):
        digest.update(chunk)
