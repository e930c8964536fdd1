"""Packed token files in the cache, and what training reads from them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.data.tokenizers import Tokenizer, load_tokenizer
from moetrain.errors import DataError
from moetrain.storage import replace, storage_errors


@dataclass
class TokenFile:
    """path: raw little-endian tokens. tokens: memory-mapped, [n] uint16 or uint32. document_offsets: memory-mapped,
    [documents + 1] int64, where each document starts (its end token belongs to it)."""

    path: Path
    tokens: np.ndarray
    document_offsets: np.ndarray


class PreparedData:
    """Tokenised, packed data of one source: a training and a held-out token file, and the tokenizer.

    Raises DataError if the folder is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{folder / 'meta.json'}: damaged ({error}); delete {folder} to prepare the data again") from error
        self.vocab_size: int = self.meta["vocab_size"]
        self.eos_id: int = self.meta["eos_id"]
        self.content_hash: str = folder.name
        self.train = self._open("train")
        self.evaluation = self._open("evaluation")

    def _open(self, split: str) -> TokenFile:
        path, meta = self.folder / f"{split}.tokens", self.meta[split]
        offsets = self._map(path.with_suffix(".documents"), np.dtype("<i8"), meta["documents"] + 1)
        return TokenFile(path, self._map(path, np.dtype(self.meta["dtype"]), meta["tokens"]), offsets)

    def _map(self, path: Path, dtype: np.dtype, count: int) -> np.ndarray:
        found = path.stat().st_size if path.exists() else 0
        if found != count * dtype.itemsize:
            raise DataError(f"{path} has {found} bytes instead of {count * dtype.itemsize}; delete {self.folder} to prepare the data again")
        return np.memmap(path, dtype=dtype, mode="r") if count else np.zeros(0, dtype)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded on first use, so that training does not need the tokenizer's library."""
        return load_tokenizer(self.folder)

    def save_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer's definition into a run folder, so that the run does not depend on the cache."""
        target = folder / "tokenizer.json"
        if not target.exists():
            with storage_errors(target):
                replace(target, (self.folder / "tokenizer.json").read_bytes())
