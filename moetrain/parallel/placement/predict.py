"""The loads of the next step from those of past ones: planners run before the router does.

Hecate (arXiv 2502.02581, section 4.3) takes the mean over a short window. All ranks push the same counts and must reach
the same prediction, hence integers for planners; histories are plain lists, ready for a checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.parallel.placement.plan import Integers


class LoadPredictor(ABC):
    """History of counts of one shape, for example [L, E] loads or [L, N, E] tokens of every node."""

    @abstractmethod
    def push(self, counts: Integers) -> None:
        """Adds the counts of the newest step, int64."""

    @abstractmethod
    def mean(self) -> NDArray[np.float64] | None:
        """The predicted counts, unrounded; None without a history."""

    def predict(self) -> Integers | None:
        """The predicted counts, halves rounded up; None without a history."""
        mean = self.mean()
        return None if mean is None else np.floor(mean + 0.5).astype(np.int64)

    @abstractmethod
    def clear(self) -> None:
        """Forgets the history, for example after the router was reset."""

    @abstractmethod
    def state(self) -> list[Any]:
        """The history as nested lists of numbers."""

    @abstractmethod
    def load_state(self, state: Sequence[Any]) -> None:
        """Takes over what ``state`` returned."""


class SlidingWindow(LoadPredictor):
    """The mean of the newest ``window`` steps, of fewer while there are fewer."""

    def __init__(self, window: int = 5) -> None:
        if window < 1:
            raise ValueError(f"a window has at least 1 step, got {window}")
        self.window = window
        self.history: list[Integers] = []

    def push(self, counts: Integers) -> None:
        """Adds the counts of the newest step and drops those that left the window."""
        self.history = [*self.history, np.array(counts, dtype=np.int64)][-self.window :]

    def mean(self) -> NDArray[np.float64] | None:
        return np.mean(self.history, axis=0, dtype=np.float64) if self.history else None

    def predict(self) -> Integers | None:
        steps = len(self.history)
        return (2 * np.sum(self.history, axis=0) + steps) // (2 * steps) if steps else None

    def clear(self) -> None:
        self.history = []

    def state(self) -> list[Any]:
        return [counts.tolist() for counts in self.history]

    def load_state(self, state: Sequence[Any]) -> None:
        self.history = [np.array(counts, dtype=np.int64) for counts in state]


class LastStep(SlidingWindow):
    """The counts of the newest step."""

    def __init__(self) -> None:
        super().__init__(window=1)


class Exponential(LoadPredictor):
    """Each step weighs ``decay`` times as much as the one after it: average <- decay average + (1 - decay) counts, from
    the first counts on.

    Products and sums of float64 are correctly rounded, one element at a time: the same bits on every rank.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.average: NDArray[np.float64] | None = None

    def push(self, counts: Integers) -> None:
        new = np.array(counts, dtype=np.float64)
        self.average = new if self.average is None else self.decay * self.average + (1 - self.decay) * new

    def mean(self) -> NDArray[np.float64] | None:
        return self.average

    def clear(self) -> None:
        self.average = None

    def state(self) -> list[Any]:
        return [] if self.average is None else [self.average.tolist()]

    def load_state(self, state: Sequence[Any]) -> None:
        self.average = np.array(state[0], dtype=np.float64) if state else None


def prediction_error(actual: Integers, predicted: Integers | NDArray[np.float64]) -> float:
    """|actual - predicted|_1 / sum of actual: 0 is exact, 2 has every token at a wrong expert; 0 if there are no tokens."""
    total = int(actual.sum())
    return float(np.abs(actual - predicted).sum() / total) if total else 0.0
