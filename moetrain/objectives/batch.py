"""A micro-batch as every objective gets it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""Target of a position that does not count."""


@dataclass
class Batch:
    """B sequences of S tokens.

    tokens:   [B, S] int64 input ids.
    targets:  [B, S] int64 next tokens, IGNORE where there is none (padding behind the end of the data).
    sample:   [B] int64 global sample index of each sequence.
    document: [B, S] int64 running number of the document within the sequence, or None if attention may
        cross document boundaries.
    """

    tokens: Tensor
    targets: Tensor
    sample: Tensor
    document: Tensor | None = None

    def valid(self) -> Tensor | None:
        """[B * S] bool, True where the target counts; None if all do."""
        mask = (self.targets != IGNORE).reshape(-1)
        return None if bool(mask.all()) else mask

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        document = None if self.document is None else self.document.to(device, non_blocking=True)
        tokens, targets, sample = (t.to(device, non_blocking=True) for t in (self.tokens, self.targets, self.sample))
        return Batch(tokens, targets, sample, document)
