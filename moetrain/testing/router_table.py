"""Every router under layouts and capacity policies, against one process: a table made from the registry.

A row is what a command line says behind ``router=``: a registered router, a preset, one of VARIANTS, or a top-2 router with
a registered dropout of routes. A column is a
registered capacity policy, or one of LIMITS. A new router or policy is in the table by being registered. All losses that
the configuration accepts with a router are on. What it refuses is not run; the reason stands in the cell.
``scripts/check_routers.py`` runs all of it, the test suite a :func:`selection`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, replace
from functools import cache
from typing import Any

import moetrain.components  # noqa: F401
from moetrain.config import load
from moetrain.errors import ConfigError
from moetrain.launch.compose import compose, shipped
from moetrain.moe.layer import MoEParts
from moetrain.parallel.layouts import Layout, ParallelConfig
from moetrain.registry import components, lookup
from moetrain.testing.distributed import run_distributed
from moetrain.testing.layouts import Outcome, Scenario, merge, train_steps
from moetrain.train.settings import Config

VARIANTS = (
    "topk router.trained_from=0.4",
    "topk router.trained_until=0.5",
    "topk router.sampling=all",
    "topk router.temperature_start=3",
    "quantile_topk router.score=sigmoid",
    "recurrent_topk router.trained=false",
    "cosine_topk router.projection_size=4 router.logit_noise=1",
    "comet router.split_bias=true router.permutation_steps=2",
    "dense_to_sparse router.hard_after=2 router.threshold=0.02",
    "stochastic router.granularity=token",
    "moduleformer router.gate_size=5 router.explored=1",
    "sparsemixer router.band=0.2",
    "expert_choice router.allow_future=true",
    "expert_choice router.allow_future=true router.scope=rank",
    "base router.scope=rank",
    "sinkhorn router.scope=rank",
)
"""Rows beside the routers and presets as they are: settings that they leave off, and scopes that depend on the layout."""

LIMITS: dict[str, dict[str, Any]] = {
    "slots scope=rank": {"kind": "slots", "scope": "rank", "priority": "random", "renormalise": True},
}
"""Columns beside the registered policies."""

REQUIRED: dict[str, Any] = {"num_devices": 4, "devices_per_token": 2}
"""Values of settings that have no default."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {"kind": "single"},
    "ep": {"kind": "ep"},
    "fssdp": {"kind": "fssdp", "fssdp": {"extra_slots": 2}},
}
RECOMPUTED = ("single", "fssdp")
"""Layouts that run with activation checkpointing. It is what ``single`` has to compare with the plain run."""

MODEL = (
    "model=deepseek_moe", "model.hidden_size=16", "model.num_layers=2", "model.dense_layers=0", "model.num_heads=2",
    "model.head_dim=8", "model.num_experts=24", "model.top_k=2", "model.expert_width=8", "model.shared_width=8",
    "model.dense_width=16", "model.init_std=0.3",
)  # fmt: skip
"""Two layers of experts, for what travels between them. 24: presets of DeepSeek have 8 groups of at least 2, and DSelect-k's
term of trapped experts is constant for powers of two."""

LR = 2e-3
"""Updates amplify the rounding of earlier ones; this leaves room for 20 steps."""


def rows() -> list[str]:
    """All rows."""
    names = components("router")
    dropouts = (f"gshard dropout=[{name}]" for name in components("dropout"))
    return [*names, *(name for name in shipped("router") if name not in names), *VARIANTS, *dropouts]


def columns() -> dict[str, dict[str, Any]]:
    """All columns, as settings; the dropless one first."""
    return {name: with_required(config) for name, config in components("capacity").items()} | LIMITS


def with_required(component: type) -> dict[str, Any]:
    """The smallest configuration of a component. Raises KeyError for a required setting that REQUIRED does not know."""
    fields = dataclasses.fields(component)
    needed = [f.name for f in fields if f.default is MISSING and f.default_factory is MISSING]
    return {"kind": component.kind} | {name: REQUIRED[name] for name in needed}  # type: ignore[attr-defined]


@cache
def composed(row: str) -> dict[str, Any]:
    """The plain configuration of a row, without losses."""
    return compose(f"router={row.split()[0]}", *MODEL, *row.split()[1:]) | {"loss": {}}


@cache
def fitting_losses(row: str) -> dict[str, Any]:
    """Every registered loss that the configuration accepts with a router."""
    accepted: dict[str, Any] = {}
    for name, component in components("loss").items():
        try:
            accepted |= load(Config, composed(row) | {"loss": {name: with_required(component) | {"coefficient": 0.01}}}).loss
        except ConfigError:
            continue
    return accepted


@dataclass(frozen=True)
class RouterCell:
    """A router, a capacity policy and a layout with so many ranks; losses: names of those that are on."""

    row: str
    column: str
    layout: str
    ranks: int
    steps: int
    losses: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.row} | {self.column} | {self.layout}"

    @property
    def world_size(self) -> int:
        return 1 if self.layout == "single" else self.ranks

    def config(self) -> Config:
        """Raises ConfigError if the configuration refuses the router, or it with this policy."""
        return load(Config, composed(self.row) | {"capacity": columns()[self.column]})

    def problem(self) -> str | None:
        """Why the configuration refuses it (the first reason), None if it does not."""
        composed(self.row)  # what Hydra refuses is a mistake in the row
        try:
            self.config()
        except ConfigError as error:
            return str(error.problems[0])
        return None

    def scenarios(self) -> tuple[Scenario, Scenario]:
        """What the layout trains, and one process for comparison: with the ranks' tokens as its micro-batches if a rule
        has rank scope. Losses over a micro-step are then over a rank, as there are more micro-steps."""
        config, losses = self.config(), fitting_losses(self.row)
        by_rank = "rank" in (getattr(config.router, "scope", None), getattr(config.capacity, "scope", None))
        chosen = {name: losses[name] for name in self.losses}
        if by_rank:
            chosen = {name: replace(loss, scope="rank") if hasattr(loss, "scope") else loss for name, loss in chosen.items()}
        parts = MoEParts(router=config.router, experts=config.experts, capacity=config.capacity, loss=chosen, dropout=config.dropout)
        plain = Scenario(model=config.model, parts=parts, steps=self.steps, pad=True, lr=LR)
        reference = replace(plain, micro_batch_size=plain.batch_size // self.world_size) if by_rank else plain
        return replace(plain, recompute=self.layout in RECOMPUTED), reference

    def placement(self) -> Layout:
        settings = LAYOUTS[self.layout]
        config: ParallelConfig = load(lookup("parallel", settings["kind"]), settings, path="parallel")
        return config.resolve(self.world_size)


def train_all(rank: int, world_size: int, cells: list[tuple[Scenario, Layout]]) -> list[Outcome]:
    """Outcomes of several cells on this rank."""
    return [train_steps(rank, world_size, scenario, layout) for scenario, layout in cells]


def outcomes(cells: list[RouterCell]) -> Iterator[tuple[RouterCell, Outcome, Outcome]]:
    """Each cell with what its ranks and what one process compute. Cells with equally many ranks run in one call."""
    references: dict[Any, Outcome] = {}
    for world_size in sorted({cell.world_size for cell in cells}):
        here = [cell for cell in cells if cell.world_size == world_size]
        work = [(cell.scenarios()[0], cell.placement()) for cell in here]
        by_rank = [train_all(0, 1, work)] if world_size == 1 else run_distributed(train_all, world_size, work, timeout=60.0 * len(work))
        for cell, parts in zip(here, zip(*by_rank, strict=True), strict=True):
            reference = cell.scenarios()[1]
            key = (cell.row, cell.column, cell.losses, reference.micro_batch_size)
            if key not in references:
                references[key] = train_steps(0, 1, reference, "single")
            yield cell, merge(list(parts)), references[key]


def cells(row: str, ranks: int, steps: int) -> list[RouterCell]:
    """All of a row, refused cells included. All losses are on where nothing is dropped, a third of them under a limit: they
    look at the choices before it."""
    losses = tuple(fitting_losses(row))
    return [
        RouterCell(row, column, layout, ranks, steps, losses[i % 3 :: 3] if i else losses)
        for i, column in enumerate(columns())
        for layout in LAYOUTS
    ]


@cache
def selection(ranks: int, steps: int) -> dict[str, list[RouterCell]]:
    """By row a cell for each layout, dropless and with a limit in turn, with a third of its losses, the least used of
    each first: over all rows layouts, policies and losses meet. What the configuration refuses is left out."""
    chosen: dict[str, list[RouterCell]] = {}
    uses: Counter[Any] = Counter()
    for number, row in enumerate(rows()):
        fitting = sorted(fitting_losses(row), key=lambda name: uses[name])
        losses = tuple(fitting[: -(-len(fitting) // 3)])
        uses.update(losses)
        offered = [RouterCell(row, column, "single", ranks, steps, losses) for column in columns()]
        accepted = [cell for cell in offered if cell.problem() is None]
        chosen[row] = []
        for i, layout in enumerate(LAYOUTS if accepted else (), start=number):
            dropless, *limits = accepted
            met = {cell: (uses[cell.column, layout], uses[cell.column]) for cell in limits}
            cell = min(limits, key=lambda limit: met[limit]) if i % 2 else dropless
            uses.update([cell.column, (cell.column, layout)])
            chosen[row].append(replace(cell, layout=layout))
    return chosen
