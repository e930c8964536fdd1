"""Schedules of routing: pure functions of the step, so that a resumed run goes on where it stopped."""

from __future__ import annotations

import math
from typing import Literal

TopKSchedule = Literal["linear", "cosine", "exponential", "step"]
Course = Literal["linear", "cosine", "exponential"]


def scheduled_top_k(start: int, end: int, step: int, total_steps: int, kind: TopKSchedule) -> int:
    """Experts per token in a step (from 0), on the way from ``start`` to ``end``; halves are rounded to even.

    linear, cosine and exponential are SMoE-Dropout's (2303.01610); the exponential one shrinks the distance by 1% in each
    300th part of training. step: as long at each of start, 2 start, 4 start, ..., end.
    """
    if kind == "linear":
        top_k = start + round((end - start) * step / total_steps)
    elif kind == "cosine":
        top_k = end + round((start - end) * math.cos(math.pi * step / (2 * total_steps)))
    elif kind == "exponential":
        top_k = end + round((start - end) * 0.99 ** (step // max(1, total_steps // 300)))
    else:
        doublings = math.ceil(abs(math.log2(end / start)))
        stage = min(doublings, step * (doublings + 1) // total_steps)
        top_k = start * 2**stage if end > start else start // 2**stage
    return max(min(start, end), min(top_k, max(start, end)))


def scheduled_value(start: float, end: float, step: int, total_steps: int, course: Course) -> float:
    """A positive number in a step (from 0), on the way from ``start`` to ``end``; exponential: by the same factor in each step,
    cosine: half a wave, slow at both ends."""
    progress = min(1.0, step / total_steps)
    if course == "linear":
        return start + (end - start) * progress
    if course == "exponential":
        return start * (end / start) ** progress
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
