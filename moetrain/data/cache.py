"""The shared cache: tokenizers and packed data, by content hash."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.errors import StorageError


def cache_dir() -> Path:
    """``$MOETRAIN_CACHE``, by default ``~/.cache/moetrain``."""
    return Path(os.environ.get("MOETRAIN_CACHE") or Path.home() / ".cache" / "moetrain").expanduser()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Exclusive lock on a file among processes; released also by a process that is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into StorageError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES):
            raise StorageError(f"cannot write {path}: {error.strerror}") from error
        raise
