"""Documents -> tokens -> packed files in the cache, once per content.

A cache entry is named by a hash of the files' bytes, the tokenizer and the settings that matter; sequence
length and masking are applied when reading. Whether a document is held out depends on its text alone, so adding
documents moves none of the others.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from moetrain.data.cache import hash_file, locked, new_entry
from moetrain.data.prepared import PreparedData
from moetrain.data.sources import TRAINED, DataConfig, read_text
from moetrain.data.tokenizers import ByteTokenizer, Tokenizer, from_definition, train_bpe
from moetrain.errors import ConfigError, DataError, Problem
from moetrain.storage import cache_dir, storage_errors, write

Progress = Callable[[str, int, int | None], None]
FORMAT = 2
"""Changes whenever an older cache entry must not be used."""

BATCH = 256
"""Documents that are tokenised together."""

NOT_IN_KEY = ("seq_len", "mask_documents", "path", "streaming", "tokenizer", "vocab_size")
"""Settings that do not change the tokens, or enter the key in another form."""


def prepare(config: DataConfig, *, progress: Progress | None = None) -> PreparedData:
    """Prepare the data of a configuration, or find it in the cache. Safe in several processes at once.

    progress(stage, done, total) is called now and then; total is None where it is unknown. Raises DataError for
    missing, empty or unreadable data, StorageError if the cache cannot be written.
    """
    report = progress or _silent
    if config.tokenizer not in TRAINED and not Path(config.tokenizer).expanduser().is_file():
        expected = "must be bpe, bytes, or the path of an existing tokenizer.json"
        raise ConfigError([Problem("data.tokenizer", config.tokenizer, expected)])
    files = config.files()
    key = content_key(config, files, report)
    folder = cache_dir() / "data" / key
    if not folder.exists():
        with storage_errors(folder, hint=" (MOETRAIN_CACHE sets the cache's place)"), locked(key):
            if not folder.exists():
                _build(config, files, folder, report)
    return PreparedData(folder)


def _silent(stage: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""


def content_key(config: DataConfig, files: Sequence[Path], report: Progress = _silent) -> str:
    """Hash of everything that decides what the token files hold; where the files lie and how they are called does not."""
    digest = xxhash.xxh3_128()
    fields: dict[str, Any] = {name: value for name, value in vars(config).items() if name not in NOT_IN_KEY}
    fields["tokenizer"] = config.tokenizer if config.tokenizer in TRAINED else "file"
    fields["vocab_size"] = config.vocab_size if config.tokenizer == "bpe" else None
    digest.update(json.dumps([FORMAT, config.kind, fields], sort_keys=True).encode())
    if fields["tokenizer"] == "file":
        hash_file(digest, Path(config.tokenizer).expanduser())
    for number, file in enumerate(files, start=1):
        hash_file(digest, file)
        digest.update(b"\0end of file\0")  # so that moving text from one file to the next changes the key
        report("reading", number, len(files))
    return digest.hexdigest()


def _documents(config: DataConfig, files: Sequence[Path]) -> Iterator[str]:
    count = 0
    for file in files:
        for document in config.documents(file):
            if not document.strip():
                continue
            yield document
            count += 1
            if count == config.max_documents:
                return


@dataclass(frozen=True)
class Split:
    """num_documents: in all. threshold: a document is held out if its 64-bit hash is below. tail: share of the tokens
    at the end of the data that is held out instead, where no document falls below the threshold."""

    num_documents: int
    threshold: int
    tail: float

    def holds_out(self, document: str) -> bool:
        return _document_hash(document) < self.threshold


def _document_hash(document: str) -> int:
    return xxhash.xxh3_64_intdigest(document.encode())


def plan_split(documents: Iterator[str], fraction: float) -> Split:
    """Hold out about ``fraction`` of the documents, but never all of them; part of the stream if that holds out none."""
    count, lowest, highest = 0, 1 << 64, 0
    for count, document in enumerate(documents, start=1):  # noqa: B007
        value = _document_hash(document)
        lowest, highest = min(lowest, value), max(highest, value)
    threshold = min(int(fraction * 2.0**64), highest)
    return Split(count, threshold, tail=0.0 if lowest < threshold else fraction)


def _build(config: DataConfig, files: Sequence[Path], folder: Path, report: Progress) -> None:
    report("splitting", 0, None)
    split = plan_split(_documents(config, files), config.eval_fraction)
    if split.num_documents == 0:
        raise DataError(f"data: no text in {len(files)} file(s), the first is {files[0] if files else 'missing'}")
    tokenizer = make_tokenizer(config, files, split, report)
    with new_entry(folder) as temporary:
        meta = _pack(_documents(config, files), split, tokenizer, temporary, report)
        if content_key(config, files) != folder.name:  # the entry would hold something else than its name says, for good
            raise DataError("data: the files or the tokenizer changed while they were being prepared; start again when they are complete")
        meta["tokenizer_xxh3_64"] = xxhash.xxh3_64_hexdigest(tokenizer.definition.encode())
        write(temporary / "tokenizer.json", tokenizer.definition)
        write(temporary / "meta.json", json.dumps(meta, indent=1))


def make_tokenizer(config: DataConfig, files: Sequence[Path], split: Split, report: Progress) -> Tokenizer:
    """The tokenizer that data.tokenizer names; a BPE is trained on the documents that are not held out, and kept in the
    cache by their hash, so that it is not trained again after an interruption."""
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer != "bpe":
        path = Path(config.tokenizer).expanduser()
        return from_definition(read_text(path), source=str(path))

    def texts() -> Iterator[str]:
        return (text for text in _documents(config, files) if not split.holds_out(text))

    report("training the tokenizer", 0, None)
    digest = xxhash.xxh3_128(f"{FORMAT}:{config.vocab_size}:".encode())
    for text in texts():
        digest.update(_document_hash(text).to_bytes(8, "little"))
    folder = cache_dir() / "tokenizers" / digest.hexdigest()
    with locked(f"tokenizer-{folder.name}"):
        if not folder.exists():
            with new_entry(folder) as temporary:
                write(temporary / "tokenizer.json", train_bpe(texts(), config.vocab_size))
    return from_definition(read_text(folder / "tokenizer.json"), source=str(folder))


class _Writer:
    """Appends documents to the token file of one split."""

    def __init__(self, file: BinaryIO, path: Path, dtype: np.dtype) -> None:
        self.file, self.path, self.dtype = file, path, dtype
        self.offsets = array("q", [0])

    def add(self, ids: Sequence[int]) -> None:
        self.file.write(np.asarray(ids, dtype=self.dtype).tobytes())
        self.offsets.append(self.offsets[-1] + len(ids))

    def finish(self) -> dict[str, Any]:
        """Bring everything to disk; returns the split's entry of meta.json."""
        self.file.flush()
        os.fsync(self.file.fileno())
        write(self.path.with_suffix(".documents"), self.offsets.tobytes())
        digest = xxhash.xxh3_64()
        hash_file(digest, self.path)
        return {"tokens": self.offsets[-1], "documents": len(self.offsets) - 1, "xxh3_64": digest.hexdigest()}


def _pack(documents: Iterator[str], split: Split, tokenizer: Tokenizer, folder: Path, report: Progress) -> dict[str, Any]:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    paths = folder / "train.tokens", folder / "evaluation.tokens"
    with paths[0].open("wb") as first, paths[1].open("wb") as second:
        train, evaluation = _Writer(first, paths[0], dtype), _Writer(second, paths[1], dtype)
        characters = done = 0
        for batch in _batches(documents):
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                (evaluation if split.holds_out(text) else train).add([*ids, tokenizer.eos_id])
            characters += sum(map(len, batch))
            done += len(batch)
            report("tokenising", done, split.num_documents)
        if split.tail:
            _move_tail(train, evaluation, split.tail)
        meta = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id, "dtype": dtype.str, "characters": characters}
        return {**meta, "train": train.finish(), "evaluation": evaluation.finish()}


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for document in documents:
        batch.append(document)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _move_tail(train: _Writer, evaluation: _Writer, fraction: float) -> None:
    """Move the last tokens from one file to the other, at least the two that a prediction needs; both keep that many."""
    total = train.offsets[-1]
    count = min(max(2, round(total * fraction)), total - 2)
    if count < 2:
        return
    boundary = total - count
    train.file.flush()
    tail = np.fromfile(train.path, dtype=train.dtype, offset=boundary * train.dtype.itemsize)
    evaluation.file.write(tail.tobytes())
    train.file.truncate(boundary * train.dtype.itemsize)
    evaluation.offsets = array("q", [0, *(offset - boundary for offset in train.offsets if offset > boundary)])
    train.offsets = array("q", [*(offset for offset in train.offsets if offset < boundary), boundary])
