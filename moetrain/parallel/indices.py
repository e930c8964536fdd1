"""From integers on the host to indices on the device, without making the host wait for it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moetrain.ops.permute import Rows, inverse_permutation
from moetrain.parallel.placement.plan import Integers


def on_device(integers: Integers, device: torch.device) -> Tensor:
    """The same numbers, [...] int64; a GPU gets them when its stream comes to that."""
    return torch.from_numpy(np.ascontiguousarray(integers)).to(device, non_blocking=True)


def repeated(values: Tensor, lengths: Integers) -> Tensor:
    """values[i] lengths[i] times. values: [n] on the device; lengths: [n]."""
    return values.repeat_interleave(on_device(lengths, values.device), output_size=int(lengths.sum()))


def ranges(starts: Integers, lengths: Integers, device: torch.device) -> Tensor:
    """The concatenation of start, start + 1, ... of each length: [lengths.sum()] int64."""
    shift = repeated(on_device(starts - (np.cumsum(lengths) - lengths), device), lengths)
    return shift + torch.arange(shift.numel(), device=device)


def regroup(counts: Integers, device: torch.device) -> Rows:
    """Rows ordered by (slot, source) as copies of rows that arrive ordered by (source, slot), one of each.

    counts: [sources, slots].
    """
    sources, slots = counts.shape
    by_slot = repeated(torch.arange(slots, device=device).repeat(sources), counts.reshape(-1)).argsort(stable=True)
    return Rows(by_slot, inverse_permutation(by_slot), None, by_slot.numel())
