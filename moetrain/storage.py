"""Where things are kept between runs, writing files that survive a crash, and a disk's refusals as one kind of error."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.errors import MoetrainError, StorageError

REFUSALS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTDIR, errno.EEXIST,
}  # fmt: skip
"""Error numbers that mean: this place cannot be written (full, over quota, read-only, broken, not ours, in the way)."""


def cache_dir() -> Path:
    """``$MOETRAIN_CACHE``, by default ``~/.cache/moetrain``."""
    return Path(os.environ.get("MOETRAIN_CACHE") or Path.home() / ".cache" / "moetrain").expanduser()


@contextmanager
def storage_errors(path: Path, *, hint: str = "") -> Iterator[None]:
    """Turn a refused write into StorageError naming the file, or ``path`` where the system does not name one.

    torch's zip writer fails over a refusal with an error of its own, so it may be anywhere in the chain of causes.
    """
    try:
        yield
    except MoetrainError:
        raise
    except Exception as error:
        link: BaseException | None = error
        while link is not None:
            if isinstance(link, OSError) and link.errno in REFUSALS:
                raise StorageError(f"cannot write {link.filename or path}: {link.strerror}{hint}") from error
            link = link.__cause__ or link.__context__
        raise


def sync(path: Path) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: str | bytes) -> None:
    """Write a whole file; it is on disk when this returns."""
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: str | bytes) -> None:
    """Write a whole file in one step: readers, and a crash at any time, see the old content or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary, content)
    temporary.replace(path)
    sync(path.parent)
