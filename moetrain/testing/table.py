"""The proof that layouts change nothing, as one table: layouts that users run x situations, by number of ranks.

Each cell trains five steps and compares losses, outputs, gradients, their norm and weights with one process.
``scripts/check_layouts.py`` runs all of it, the test suite a :func:`selection`. A new layout is a row, a new situation an
entry of :data:`moetrain.testing.scenarios.SCENARIOS`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

import moetrain.components  # noqa: F401
from moetrain.ops.noise import hash_text
from moetrain.parallel.executor import PlacedExecutor
from moetrain.parallel.layouts import FSSDPSettings, Layout, ParallelConfig
from moetrain.parallel.placement.plan import PlacementPlan
from moetrain.registry import lookup
from moetrain.testing.distributed import run_distributed
from moetrain.testing.layouts import Outcome, Plans, Scenario, merge, train_steps
from moetrain.testing.scenarios import SCENARIOS, compare, largest_error

RANKS = (1, 2, 3, 4, 6, 8)
SEQUENCES = 24
"""Per step: every number of ranks divides them."""
STEPS = 5


def random_plan(executor: PlacedExecutor, layer: str, step: int) -> PlacementPlan:
    """Every copy exists with probability 1/2; in some steps and layers there are none, in some all."""
    owner = executor.plan.owner
    rng = np.random.default_rng(hash_text(f"{layer}/{step}"))
    holders = rng.random((owner.size, executor.plan.num_ranks)) < rng.choice([0.0, 0.5, 0.5, 1.0])
    holders[np.arange(owner.size), owner] = True
    plan = PlacementPlan(owner, holders)
    plan.validate()
    return plan


@dataclass(frozen=True)
class Row:
    """A layout as a user configures it. plans: replaces its planner. alone: also on one rank, where all layouts are one."""

    config: ParallelConfig
    plans: Plans | None = None
    alone: bool = False

    def ranks(self, scenario: Scenario) -> tuple[int, ...]:
        """Numbers of ranks on which the layout accepts the scenario."""
        num_experts = scenario.parts.experts.num_experts
        return tuple(
            ranks
            for ranks in RANKS
            if (ranks > 1 or self.alone) and not list(self.config.check("parallel", world_size=ranks, num_experts=num_experts))
        )

    def layout(self, ranks: int) -> Layout:
        """The layout on so many ranks."""
        return self.config.resolve(ranks)


def row(kind: str, *, plans: Plans | None = None, alone: bool = False, fssdp: Mapping[str, Any] | None = None, **settings: Any) -> Row:
    """``parallel=kind`` with these settings. fssdp: settings of ``parallel.fssdp``."""
    if fssdp is not None:
        settings["fssdp"] = FSSDPSettings(**fssdp)
    return Row(lookup("parallel", kind)(**settings), plans, alone)


PAPER = dict(planner="sparse_materialization", split="even", overlap_degree=2, reshard_every=1, extra_slots=1)
LAYOUTS: dict[str, Row] = {
    "single": row("single", alone=True),
    "fsdp": row("fsdp", alone=True),
    "fsdp, 2 replicas": row("fsdp", replicate=2),
    "fsdp x tensor": row("fsdp", tensor=2),
    "ep": row("ep", alone=True),
    "ep, 2 replicas": row("ep", replicate=2),
    "ep, 2 chunks": row("ep", degree=2),
    "ep, deduplicate": row("ep", deduplicate=True, nodes=2),
    "ep x tensor": row("ep", tensor=2),
    "ep x tensor, 2 replicas": row("ep", tensor=2, replicate=2),
    "ep x tensor x expert_tensor": row("ep", tensor=2, expert_tensor=2),
    "zero3_experts": row("zero3_experts"),
    "zero3_experts, kept": row("zero3_experts", rematerialize=False),
    "fssdp": row("fssdp", fssdp=dict(extra_slots=1)),
    "fssdp, rematerialize": row("fssdp", fssdp=dict(extra_slots=1, rematerialize=True, prediction="last")),
    "fssdp, two_stage": row("fssdp", nodes=2, fssdp=dict(extra_slots=1, transport="two_stage")),
    "fssdp, striped": row("fssdp", nodes=2, fssdp=dict(extra_slots=1, transport="striped", rematerialize=True)),
    "fssdp, 3 chunks": row("fssdp", degree=3, fssdp=dict(extra_slots=1)),
    "fssdp, deduplicate": row("fssdp", deduplicate=True, nodes=2, fssdp=dict(extra_slots=1)),
    "fssdp, calibrate": row("fssdp", fssdp=dict(extra_slots=1, calibrate=True)),
    "fssdp, reshard every step": row("fssdp", fssdp=dict(extra_slots=1, reshard_every=1, prediction="exponential")),
    "fssdp, accumulate=step": row("fssdp", fssdp=dict(extra_slots=1, accumulate="step")),
    "fssdp_paper": row("fssdp_paper", fssdp=PAPER),
    "fssdp, 2 replicas": row("fssdp", replicate=2, fssdp=dict(extra_slots=1, reshard_every=2)),
    "fssdp x tensor": row("fssdp", tensor=2, fssdp=dict(extra_slots=1, reshard_every=2)),
    "fssdp x tensor x expert_tensor": row("fssdp", tensor=2, expert_tensor=2, fssdp=dict(extra_slots=1, rematerialize=True)),
    "random copies": row("fssdp", plans=random_plan, fssdp=dict(extra_slots=0)),
    "random copies, even split": row("fssdp", plans=random_plan, fssdp=dict(extra_slots=0, split="even")),
    "random copies, rematerialize": row("fssdp", plans=random_plan, fssdp=dict(extra_slots=0, rematerialize=True)),
    "random copies, two_stage": row("fssdp", plans=random_plan, nodes=2, fssdp=dict(extra_slots=0, transport="two_stage")),
    "random copies, striped": row(
        "fssdp", plans=random_plan, nodes=2, fssdp=dict(extra_slots=0, transport="striped", rematerialize=True)
    ),
    "random copies, 3 chunks": row("fssdp", plans=random_plan, degree=3, fssdp=dict(extra_slots=0, rematerialize=True)),
    "random copies, deduplicate": row("fssdp", plans=random_plan, deduplicate=True, nodes=2, fssdp=dict(extra_slots=0)),
    "random copies, 2 replicas": row("fssdp", plans=random_plan, replicate=2, fssdp=dict(extra_slots=0)),
    "random copies x tensor": row("fssdp", plans=random_plan, tensor=2, fssdp=dict(extra_slots=0)),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A layout (row), a scenario (column) and a number of ranks."""

    layout: str
    scenario: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.layout} | {self.scenario} | {self.ranks} ranks"

    def run(self) -> tuple[Outcome, Outcome]:
        """What the ranks and what one process compute, the latter without recomputation or micro-batches."""
        chosen = LAYOUTS[self.layout]
        layout, scenario = chosen.layout(self.ranks), scaled(self.scenario)
        if scenario.micro_batch_size is not None:
            scenario = replace(scenario, micro_batch_size=SEQUENCES // (3 * layout.data_world_size) or 1)
        if self.ranks == 1:
            return train_steps(0, 1, scenario, layout), one_process(self.scenario)
        return merge(run_distributed(train_steps, self.ranks, scenario, layout, 1, chosen.plans, timeout=180)), one_process(self.scenario)

    def check(self) -> None:
        """Raises AssertionError naming what differs, RankError if a rank fails."""
        compare(*self.run())

    def error(self) -> float:
        """The largest relative error."""
        return largest_error(*self.run())


def scaled(name: str) -> Scenario:
    """A scenario at the size of the table."""
    return replace(SCENARIOS[name], batch_size=SEQUENCES, steps=STEPS)


@lru_cache
def one_process(name: str) -> Outcome:
    """What every layout must give."""
    return train_steps(0, 1, replace(scaled(name), recompute=False, micro_batch_size=None), "single")


def cells() -> Iterator[Cell]:
    """The full product."""
    for (layout, chosen), name in itertools.product(LAYOUTS.items(), SCENARIOS):
        yield from (Cell(layout, name, ranks) for ranks in chosen.ranks(SCENARIOS[name]))


def selection(scenarios_per_layout: int = 2) -> list[Cell]:
    """A part of the product in which every layout meets that many scenarios and every scenario several layouts.

    Greedy and deterministic: what has been chosen least comes next, few ranks more often than many.
    """
    offered: dict[str, list[Cell]] = {layout: [] for layout in LAYOUTS}
    for cell in cells():
        offered[cell.layout].append(cell)
    chosen: list[Cell] = []
    uses: Counter[Any] = Counter()
    for _, layout in itertools.product(range(scenarios_per_layout), LAYOUTS):
        new = [cell for cell in offered[layout] if not uses[layout, cell.scenario]]
        # of equals the first
        best = min(new, key=lambda c: (uses[c.scenario], uses[c.layout, c.ranks], uses[c.scenario, c.ranks], uses[c.ranks] * c.ranks))
        chosen.append(best)
        uses.update([best.scenario, best.ranks, (layout, best.scenario), (layout, best.ranks), (best.scenario, best.ranks)])
    return chosen
