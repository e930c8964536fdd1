"""From step to step: the loads that were, the plan that follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moetrain.parallel.placement.plan import Integers, PlacementPlan
from moetrain.parallel.placement.predict import LoadPredictor, prediction_error

Planner = Callable[[Integers, Integers], PlacementPlan]
"""(predicted counts [R, E], owner [E]) -> plan"""


@dataclass(frozen=True)
class Observation:
    """One layer in one training step. counts: [R, E] rows that each rank had for each expert. rank_rows: [R] rows that
    each rank computed."""

    counts: Integers
    rank_rows: Integers

    def __add__(self, other: Observation) -> Observation:
        return Observation(self.counts + other.counts, self.rank_rows + other.rank_rows)

    @property
    def max_over_mean(self) -> float:
        """Rows of the busiest rank over the mean."""
        total = int(self.rank_rows.sum())
        return float(self.rank_rows.max() * self.rank_rows.size / total) if total else 1.0


@dataclass(frozen=True)
class LayerFigures:
    """What one step tells about one layer's placement. counts: [R, E] rows that each rank had for each expert. values:
    figures for the metrics by name."""

    counts: Integers
    values: dict[str, float]


class LayerScheduler:
    """Plans of one MoE layer. Without a history, experts stay with their owners."""

    def __init__(self, owner: Integers, ranks: int, planner: Planner, predictor: LoadPredictor) -> None:
        self.owner, self.ranks, self.planner, self.predictor = owner, ranks, planner, predictor
        self.predicted: Integers | None = None

    def plan(self) -> PlacementPlan:
        """The plan of the next step."""
        self.predicted = self.predictor.predict()
        predicted = np.zeros((self.ranks, self.owner.size), dtype=np.int64) if self.predicted is None else self.predicted
        return self.planner(predicted, self.owner)

    def observe(self, seen: Observation, plan: PlacementPlan) -> LayerFigures:
        """Take a step's loads into the history."""
        copies = plan.copies.sum(axis=0)
        values = {"rank_max_over_mean": seen.max_over_mean, "copies": int(copies.sum()), "copies_max": int(copies.max())}
        if self.predicted is not None:
            values["prediction_error"] = prediction_error(seen.counts, self.predicted)
        self.predictor.push(seen.counts)
        return LayerFigures(seen.counts, values)

    def state(self) -> dict[str, Any]:
        """For the checkpoint: a resumed run plans as the interrupted one would have."""
        return {"owner": self.owner.tolist(), "history": self.predictor.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned, on the same number of ranks."""
        self.owner = np.asarray(state["owner"], dtype=np.int64)
        self.predictor.load_state(state["history"])
