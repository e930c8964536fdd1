"""Everything that looks at the whole vocabulary: embedding, and log-probabilities of targets."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from moetrain.ops.cross_entropy import linear_cross_entropy


class Vocabulary(Protocol):
    """V entries. Where other ranks hold a part of them, ``rows`` and ``logits`` are this rank's part, and the results
    are those of the whole vocabulary. T tokens, D features."""

    def embed(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """tokens [B, S] int64, rows [V, D] -> [B, S, D]; under tensor parallelism the rank's run of the tokens [T', D]."""
        ...

    def log_partition(self, logits: Tensor) -> Tensor:
        """logits [T, V] -> logarithm of the sum of their exponentials [T]."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """values [T, V] -> sum over the vocabulary [T]."""
        ...

    def negative_log_likelihood(self, logits: Tensor, targets: Tensor, *, ignore: int) -> Tensor:
        """Sum in nats over the targets [T] int64 other than ``ignore``. logits: [T, V]."""
        ...

    def cross_entropy(self, hidden: Tensor, rows: Tensor, targets: Tensor, *, ignore: int, z_weight: float = 0.0) -> tuple[Tensor, Tensor]:
        """The same sum from hidden [T, D] and rows [V, D] without the logits of all tokens in memory, and z_weight times
        the sum of squared log-partitions. The first carries the gradient of both, see :func:`linear_cross_entropy`."""
        ...


class WholeVocabulary:
    """All of it is here."""

    def embed(self, tokens: Tensor, rows: Tensor) -> Tensor:
        return F.embedding(tokens, rows)

    def log_partition(self, logits: Tensor) -> Tensor:
        return torch.logsumexp(logits, dim=1)

    def sum(self, values: Tensor) -> Tensor:
        return values.sum(dim=1)

    def negative_log_likelihood(self, logits: Tensor, targets: Tensor, *, ignore: int) -> Tensor:
        return F.cross_entropy(logits, targets, ignore_index=ignore, reduction="sum")

    def cross_entropy(self, hidden: Tensor, rows: Tensor, targets: Tensor, *, ignore: int, z_weight: float = 0.0) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(hidden, rows, targets, ignore=ignore, z_weight=z_weight)
