"""Cutting a packed token stream into training sequences."""

from __future__ import annotations

import numpy as np
import torch

from moetrain.data.prepared import TokenFile
from moetrain.errors import DataError
from moetrain.objectives.batch import IGNORE, Batch


class PackedSequences:
    """Sample i is tokens [i * S, i * S + S] of the stream: S inputs and their next tokens. The last one may be short;
    it is padded with end-of-document inputs whose targets do not count.

    seq_len: S. mask_documents: number the documents of each sequence. Raises DataError if there is no sample.
    """

    def __init__(self, tokens: TokenFile, *, seq_len: int, eos_id: int, mask_documents: bool = False) -> None:
        self.tokens, self.seq_len, self.eos_id, self.mask_documents = tokens, seq_len, eos_id, mask_documents
        if len(self) == 0:
            raise DataError(f"{tokens.path}: {tokens.tokens.size} token(s), but a sample needs at least 2")

    def __len__(self) -> int:
        return max(0, -(-(self.tokens.tokens.size - 1) // self.seq_len))

    def batch(self, samples: np.ndarray, global_index: np.ndarray) -> Batch:
        """Sequences ``samples`` [B] int64 in [0, len), known to noise and reports as ``global_index`` [B] int64."""
        length = self.seq_len + 1
        rows = np.full((len(samples), length), IGNORE, dtype=np.int64)
        for row, sample in zip(rows, samples, strict=True):
            piece = self.tokens.tokens[sample * self.seq_len : sample * self.seq_len + length]
            row[: piece.size] = piece
        stream = torch.from_numpy(rows)
        tokens = stream[:, :-1].clone()
        targets = torch.where(tokens == IGNORE, IGNORE, stream[:, 1:])
        tokens[tokens == IGNORE] = self.eos_id
        document = None
        if self.mask_documents:
            ends = (tokens == self.eos_id).long()
            document = ends.cumsum(1) - ends  # the end token still belongs to the document that it ends
        return Batch(tokens, targets, torch.from_numpy(np.asarray(global_index, dtype=np.int64)), document)
