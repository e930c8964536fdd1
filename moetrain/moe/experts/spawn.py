"""Experts that start as one (EvoMoE, 2112.14397): a dense FFN is trained first, and copies of it become the experts.

The paper's public code lacks this phase. What is not known from it is a setting here: how much of a copy is masked,
what stands in masked places, and what becomes of the optimizer's moments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from moetrain.config import setting
from moetrain.errors import Problem


@dataclass(kw_only=True)
class SpawnSettings:
    """When one FFN in place of all experts of a layer becomes these experts, and how they come to differ."""

    after: float = setting(
        0.0,
        doc="part of train.steps in which each MoE layer has one FFN instead of router and experts; 0: none",
        ge=0,
        lt=1,
        schedule="EvoMoE 2112.14397",
    )
    mask: float = setting(
        0.1, doc="part of its weights, at random, that an expert does not take over [inferred]; 0: equal experts", ge=0, lt=1
    )
    noise: float = setting(0.0, doc="standard deviation of masked weights over the root mean square of their matrix; 0: zeros", ge=0)
    moments: Literal["copy", "zero"] = setting(
        "copy", doc="optimizer moments of an expert: those of the FFN, but zero where its weights are masked; or all zero"
    )

    def problems(self, path: str) -> Iterable[Problem]:
        if self.noise and not self.mask:
            yield Problem(f"{path}.noise", self.noise, f"has no effect with {path}.mask=0")

    def step(self, total_steps: int) -> int | None:
        """Optimizer steps, at least one, after which the experts are spawned; None if they never are."""
        return max(1, round(self.after * total_steps)) if self.after else None
