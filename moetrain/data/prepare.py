"""Documents -> tokens -> packed files in the cache, once per content.

A cache entry is named by a hash of the documents' bytes, the tokenizer and the settings that matter; sequence
length and masking are applied when reading. An entry appears by rename, so a half-written one is never seen.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from moetrain.data.cache import cache_dir, locked, storage_errors
from moetrain.data.prepared import PreparedData
from moetrain.data.sources import DataConfig
from moetrain.data.tokenizers import ByteTokenizer, Tokenizer, from_definition, train_bpe
from moetrain.errors import DataError

Progress = Callable[[str, int, int | None], None]
FORMAT = 1
"""Changes whenever an older cache entry must not be used."""

BATCH = 256
"""Documents that are tokenised together."""


def prepare(config: DataConfig, *, progress: Progress | None = None) -> PreparedData:
    """Prepare the data of a configuration, or find it in the cache.

    progress(stage, done, total) is called now and then. Raises DataError for missing, empty or unreadable data,
    StorageError if the cache cannot be written.
    """
    report = progress or (lambda stage, done, total: None)
    files = config.files()
    key = content_key(config, files, report)
    folder = cache_dir() / "data" / key
    with storage_errors(folder):
        if not (folder / "meta.json").exists():
            with locked(cache_dir() / "locks" / key):
                if not (folder / "meta.json").exists():
                    _build(config, files, folder, report)
    return PreparedData(folder)


def content_key(config: DataConfig, files: list[Path], report: Progress) -> str:
    """Hash of everything that decides what the token files hold."""
    digest = xxhash.xxh3_128()
    fields = {name: value for name, value in vars(config).items() if name not in ("seq_len", "mask_documents", "path", "streaming")}
    digest.update(json.dumps([FORMAT, config.kind, fields], sort_keys=True).encode())
    if config.tokenizer not in ("bpe", "bytes"):
        digest.update(Path(config.tokenizer).expanduser().read_bytes())
    for number, file in enumerate(files):
        report("reading", number, len(files))
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from error
        digest.update(f"{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def _documents(config: DataConfig, files: list[Path]) -> Iterator[str]:
    count = 0
    for file in files:
        for document in config.documents(file):
            if not document.strip():
                continue
            yield document
            count += 1
            if count == config.max_documents:
                return


def is_held_out(document: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out data: by its content, so it does not depend on the other documents."""
    return xxhash.xxh3_64_intdigest(document.encode()) < fraction * 2.0**64


def _build(config: DataConfig, files: list[Path], folder: Path, report: Progress) -> None:
    if not any(True for _ in _documents(config, files)):
        raise DataError(f"data: no text in {len(files)} file(s), the first is {files[0] if files else 'missing'}")
    tokenizer = make_tokenizer(config, files, report)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name[:8]}-", dir=folder.parent))
    try:
        meta = _pack(config, files, tokenizer, temporary, report)
        _write(temporary / "tokenizer.json", tokenizer.definition)
        _write(temporary / "meta.json", json.dumps(meta, indent=1))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_tokenizer(config: DataConfig, files: list[Path], report: Progress) -> Tokenizer:
    """The tokenizer that data.tokenizer names; a BPE is trained on the documents that are not held out."""
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer != "bpe":
        path = Path(config.tokenizer).expanduser()
        return from_definition(path.read_text(encoding="utf-8"), source=str(path))
    report("training the tokenizer", 0, None)
    texts = (text for text in _documents(config, files) if not is_held_out(text, config.eval_fraction))
    return from_definition(train_bpe(texts, config.vocab_size), source="the trained tokenizer")


class _Writer:
    """Appends documents to one split."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self.file = (folder / f"{split}.tokens").open("wb")
        self.offsets = [0]
        self.digest = xxhash.xxh3_64()

    def add(self, ids: list[int]) -> None:
        array = np.asarray(ids, dtype=self.dtype)
        self.file.write(array.tobytes())
        self.digest.update(array.tobytes())
        self.offsets.append(self.offsets[-1] + array.size)

    def close(self) -> dict[str, Any]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        np.save(self.folder / f"{self.split}.documents.npy", np.asarray(self.offsets, dtype=np.int64))
        return {"tokens": self.offsets[-1], "documents": len(self.offsets) - 1, "xxh3_64": self.digest.hexdigest()}


def _pack(config: DataConfig, files: list[Path], tokenizer: Tokenizer, folder: Path, report: Progress) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    train, evaluation = _Writer(folder, "train", dtype), _Writer(folder, "evaluation", dtype)
    total = sum(1 for _ in _documents(config, files))
    characters = done = 0
    pending: list[str] = []

    def flush() -> None:
        nonlocal done
        for text, ids in zip(pending, tokenizer.encode_batch(pending), strict=True):
            held_out = total > 1 and is_held_out(text, config.eval_fraction)
            (evaluation if held_out else train).add([*ids, tokenizer.eos_id])
        done += len(pending)
        pending.clear()
        report("tokenising", done, total)

    for document in _documents(config, files):
        characters += len(document)
        pending.append(document)
        if len(pending) == BATCH:
            flush()
    flush()
    meta = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id, "dtype": dtype.name, "characters": characters}
    return {**meta, "train": train.close(), "evaluation": evaluation.close()}


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
