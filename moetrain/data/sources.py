"""Where documents come from. Each source is a registered configuration that lists its files and yields texts."""

from __future__ import annotations

import codecs
import dataclasses
import glob
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import xxhash

from moetrain.config import Component, setting
from moetrain.data.cache import file_chunks, hash_file
from moetrain.errors import DataError
from moetrain.registry import register
from moetrain.storage import cache_dir

TRAINED = ("bpe", "bytes")
"""Tokenizers that need no file."""


@dataclass(kw_only=True)
class DataConfig(Component):
    """Fields that all sources share."""

    seq_len: int = setting(256, doc="S, tokens per training sequence", ge=1)
    tokenizer: str = setting("bpe", doc="bpe: byte-level BPE trained on the data; bytes; or the path of a tokenizer.json")
    vocab_size: int = setting(4096, doc="size of the trained BPE", ge=257)
    eval_fraction: float = setting(0.02, doc="share of the documents that is held out for evaluation", ge=0, lt=1)
    mask_documents: bool = setting(False, doc="attention does not cross document boundaries")
    max_documents: int | None = setting(None, doc="read at most this many documents", ge=1)

    def located(self) -> Self:
        """The same source by absolute paths, so that it is found from any working directory."""
        names = [name for name in ("path", "tokenizer") if getattr(self, name, "") not in ("", *TRAINED)]
        absolute: dict[str, Any] = {name: str(Path(getattr(self, name)).expanduser().absolute()) for name in names}
        return dataclasses.replace(self, **absolute)

    def files(self) -> list[Path]:
        """The files that documents are read from, in a stable order. Raises DataError if there are none."""
        raise NotImplementedError

    def documents(self, file: Path) -> Iterator[str]:
        """The documents in one file. Raises DataError naming the file if it cannot be read."""
        raise NotImplementedError


def find_files(path: str, *, suffixes: tuple[str, ...]) -> list[Path]:
    """A file, the matches of a glob, or the files with these suffixes below a folder. Raises DataError if there are none."""
    root = Path(path).expanduser()
    if path and root.is_dir():  # no path at all is not the working directory
        files = sorted(p for p in root.rglob("*") if p.is_file() and p.suffix in suffixes)
        wanted = f"a folder without {' or '.join(suffixes)} files"
    else:
        files = [root] if root.is_file() else sorted(Path(p) for p in glob.glob(str(root), recursive=True) if Path(p).is_file())
        wanted = "no such file or folder"
    if not files:
        raise DataError(f"data.path = {path!r}: {wanted}")
    return files


def read_text(file: Path) -> str:
    """The text of a UTF-8 file. Raises DataError naming the byte that is not UTF-8."""
    return "".join(_decoded(file))


def check_text(file: Path) -> None:
    """Raises DataError as :func:`read_text` does, without holding the text in memory."""
    for _ in _decoded(file):
        pass


def _decoded(file: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the first byte that is not decoded yet: a character may lie across two chunks
    try:
        for chunk in file_chunks(file):
            end = offset + len(decoder.getstate()[0]) + len(chunk)
            yield decoder.decode(chunk)
            offset = end - len(decoder.getstate()[0])
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: the byte at offset {offset + error.start} is not UTF-8 ({error.reason}); convert the file or leave it out"
        ) from error


@register("data", "stdlib")
@dataclass(kw_only=True)
class StdlibConfig(DataConfig):
    """Sources and docstrings of Python's standard library, which is on every machine; one document per file."""

    SKIPPED = ("test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__")

    def files(self) -> list[Path]:
        root = Path(sysconfig.get_path("stdlib"))
        return sorted(p for p in root.rglob("*.py") if not set(p.relative_to(root).parts) & set(self.SKIPPED))

    def documents(self, file: Path) -> Iterator[str]:
        try:
            yield file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            return  # a few files declare other encodings


@register("data", "text")
@dataclass(kw_only=True)
class TextConfig(DataConfig):
    """UTF-8 text files."""

    path: str = setting(doc="file, glob, or folder with .txt or .md files")
    split: Literal["file", "paragraph", "line"] = setting("file", doc="what a document is")

    def files(self) -> list[Path]:
        return find_files(self.path, suffixes=(".txt", ".md"))

    def documents(self, file: Path) -> Iterator[str]:
        text = read_text(file)
        separator = {"file": None, "paragraph": r"\r?\n[ \t]*\r?\n", "line": r"\r?\n"}[self.split]
        yield from (re.split(separator, text) if separator else [text])


@dataclass(kw_only=True)
class TableConfig(DataConfig):
    """Rows of files that the ``datasets`` library reads; one document per row."""

    path: str = setting(doc="file, glob, or folder")
    column: str = setting("text", doc="column that holds the text")
    streaming: bool = setting(False, doc="read rows one by one, without datasets' own copy in the cache")

    BUILDER: ClassVar[str]
    SUFFIXES: ClassVar[tuple[str, ...]]

    def files(self) -> list[Path]:
        return find_files(self.path, suffixes=self.SUFFIXES)

    def documents(self, file: Path) -> Iterator[str]:
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised as well
        cache = cache_dir() / "datasets"
        if not self.streaming:  # the library takes a file for unchanged if path and mtime are
            digest = xxhash.xxh3_128()
            hash_file(digest, file)
            cache /= digest.hexdigest()
        try:
            table = datasets.load_dataset(
                self.BUILDER,
                data_files=glob.escape(str(file)),
                split="train",
                streaming=self.streaming,
                cache_dir=str(cache),
            )
            columns = table.column_names or list(next(iter(table), {}))
            if self.column not in columns:
                raise DataError(f"{file}: has no column data.column = {self.column!r}; it has {', '.join(columns) or 'no rows'}")
            for number, row in enumerate(table):
                if not isinstance(row[self.column], str):
                    raise DataError(f"{file}: row {number}, column {self.column!r} holds {type(row[self.column]).__name__}, not text")
                yield row[self.column]
        except (datasets.exceptions.DatasetGenerationError, ValueError, StopIteration) as error:
            cause = error.__cause__ or error
            if isinstance(cause, OSError):  # the cache's disk, not the data
                raise cause from error
            raise DataError(f"{file}: cannot be read as {self.BUILDER} ({str(cause) or 'it has no rows'})") from error


@register("data", "json")
@dataclass(kw_only=True)
class JsonConfig(TableConfig):
    """JSON or JSON-lines files."""

    BUILDER = "json"
    SUFFIXES = (".json", ".jsonl")

    def documents(self, file: Path) -> Iterator[str]:
        check_text(file)  # the library's message would not give the byte's place in the file
        yield from super().documents(file)


@register("data", "parquet")
@dataclass(kw_only=True)
class ParquetConfig(TableConfig):
    """Parquet files."""

    BUILDER = "parquet"
    SUFFIXES = (".parquet",)


@register("data", "arrow")
@dataclass(kw_only=True)
class ArrowConfig(TableConfig):
    """Arrow files."""

    BUILDER = "arrow"
    SUFFIXES = (".arrow",)
