"""Which sequences each rank trains on at each step: a pure function of the position in the data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from moetrain.data.order import sample_at
from moetrain.data.packing import PackedSequences
from moetrain.objectives.batch import IGNORE, Batch
from moetrain.parallel.ranks import Ranks


@dataclass
class BatchPlan:
    """Cuts a global batch into accumulation steps x ranks x micro-batches.

    The set of sequences of a step does not depend on the cut, so neither does the sum of their gradients. ranks: this
    rank among the data-parallel ones.
    """

    sequences: PackedSequences
    seed: int
    global_batch_size: int
    micro_batch_size: int
    ranks: Ranks

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.ranks.world_size)

    def training_batches(self, position: int) -> list[Batch]:
        """This rank's micro-batches of the optimizer step that starts at global sample index ``position``."""
        return [self._batch(position + self._offsets(step)) for step in range(self.accumulation)]

    def evaluation_batches(self, limit: int) -> Iterator[Batch]:
        """This rank's micro-batches of ``limit`` global batches of the held-out data, always the same ones in the same
        scattered order: neighbouring sequences come from one document and would be a poor sample.

        All ranks get equally many; what lies beyond the data is a sequence without targets.
        """
        total = len(self.sequences)
        for start in range(0, min(limit * self.global_batch_size, total), self.global_batch_size):
            for step in range(self.accumulation):
                index = start + self._offsets(step)
                batch = self.sequences.batch(sample_at(0, np.minimum(index, total - 1), total), index)
                batch.targets[torch.from_numpy(index >= total)] = IGNORE
                yield batch

    def _offsets(self, step: int) -> np.ndarray:
        first = (step * self.ranks.world_size + self.ranks.rank) * self.micro_batch_size
        return np.arange(first, first + self.micro_batch_size, dtype=np.int64)

    def _batch(self, index: np.ndarray) -> Batch:
        return self.sequences.batch(sample_at(self.seed, index, len(self.sequences)), index)
