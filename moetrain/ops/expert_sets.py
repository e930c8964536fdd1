"""Experts whose weights lie in memory of their own: those that a rank owns, and its copies of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ExpertSet:
    """Stacked weights of some experts and how many rows each gets; the rows of one set follow those of the set before.

    weights: one tensor [e, ...] per parameter; views of a buffer are read in place if each expert's part is contiguous.
    counts: [e] int64. num_rows: their sum, known on the host; None if there is no other set.
    """

    weights: tuple[Tensor, ...]
    counts: Tensor
    num_rows: int | None = None


def sections(sets: Sequence[ExpertSet], num_rows: int) -> list[slice]:
    """The rows of each set among all ``num_rows``."""
    if len(sets) == 1:
        return [slice(0, num_rows)]
    ends = [0]
    for each in sets:
        assert each.num_rows is not None, "several sets need their numbers of rows"
        ends.append(ends[-1] + each.num_rows)
    assert ends[-1] == num_rows
    return [slice(begin, end) for begin, end in zip(ends[:-1], ends[1:], strict=True)]
