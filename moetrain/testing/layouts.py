"""Running a few training steps of a tiny model under a layout, to compare it with one process.

``train_steps`` runs on every rank (through ``run_distributed``) or in the calling process; what it returns is in
logical tensors, so results of different layouts can be compared key by key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.moe.layer import MoEParts
from moetrain.objectives.batch import IGNORE, Batch
from moetrain.objectives.language_modeling import LanguageModelingConfig
from moetrain.parallel.executor import PlacedExecutor
from moetrain.parallel.layouts import Layout
from moetrain.parallel.parallelize import ParallelModel, parallelize
from moetrain.parallel.placement.plan import PlacementPlan
from moetrain.parallel.ranks import Ranks
from moetrain.parallel.reshard import reshard
from moetrain.train.metrics import Phases
from moetrain.train.optim import AdamWConfig
from moetrain.train.step import accumulate_gradients, count_units


@dataclass
class Scenario:
    """A model, its parts and how to train it. micro_batch_size: None for all of a rank's sequences at once.

    pad: the last sequences of each batch have no targets in their second half, and the very last none at all.
    """

    model: Any
    parts: MoEParts
    vocab_size: int = 40
    batch_size: int = 8
    seq_len: int = 8
    steps: int = 3
    micro_batch_size: int | None = None
    recompute: bool = False
    pad: bool = False
    dtype: torch.dtype = torch.float64
    lr: float = 1e-2
    clip_norm: float = 0.5
    repeat_token: bool = False
    objective: Any = field(default_factory=LanguageModelingConfig)


@dataclass
class Outcome:
    """Per step: loss, loss_total, gradient norm, tokens per expert by layer. Of the last step: logical gradients;
    after it: logical parameters (and buffers)."""

    losses: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    selected: list[dict[str, list[int]]] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)


def synthetic_batch(scenario: Scenario, step: int, index: Tensor) -> Batch:
    """Sequences ``index`` of the global batch of a step, the same on every rank that asks for them."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(scenario.vocab_size, (scenario.batch_size, scenario.seq_len + 1), generator=generator)
    if scenario.repeat_token:
        tokens[:] = tokens[:1, :1]
    targets = tokens[:, 1:].clone()
    if scenario.pad:
        targets[-2:, scenario.seq_len // 2 :] = IGNORE
        targets[-1:] = IGNORE
    return Batch(tokens[index, :-1], targets[index], step * scenario.batch_size + index)


def local_batches(scenario: Scenario, step: int, ranks: Ranks) -> list[Batch]:
    """A data-parallel rank's micro-batches, cut as :class:`moetrain.train.data.BatchPlan` does."""
    micro = scenario.micro_batch_size or scenario.batch_size // ranks.world_size
    count = scenario.batch_size // (micro * ranks.world_size)
    firsts = [(i * ranks.world_size + ranks.rank) * micro for i in range(count)]
    return [synthetic_batch(scenario, step, torch.arange(first, first + micro)) for first in firsts]


Plans = Callable[[PlacedExecutor, str, int], PlacementPlan]
"""(executor, layer, step) -> the plan of that step"""


def train_steps(
    rank: int, world_size: int, scenario: Scenario, layout: str | Layout, replicate: int = 1, plans: Plans | None = None
) -> Outcome:
    """Train ``scenario.steps`` steps on this rank. Gradients and parameters are this rank's part; see ``merge``.

    plans: replaces the layout's planner.
    """
    ranks = Ranks(rank, world_size, rank, world_size)
    with torch.device("meta"):
        model = scenario.model.build(scenario.parts, vocab_size=scenario.vocab_size, dtype=scenario.dtype)
    chosen = layout if isinstance(layout, Layout) else Layout(layout, replicate, world_size // replicate)  # type: ignore[arg-type]
    placed = parallelize(model, chosen, ranks, device=torch.device("cpu"), recompute=scenario.recompute)
    placed.initialise(seed=0)
    placed.model.train()
    optimizer = AdamWConfig(lr=scenario.lr).build(placed)
    outcome, objective = Outcome(), scenario.objective.build()
    for step in range(scenario.steps):
        batches = local_batches(scenario, step, ranks.data_parallel(chosen.tensor))
        totals, _ = count_units(batches, placed)
        for layer in placed.model.moe_layers().values():
            layer.router.begin_step(step, scenario.steps)
        placed.begin_step()
        if plans is not None:
            for name, executor in placed.executors().items():
                executor.plan = plans(executor, name, step)
        optimizer.zero_grad(set_to_none=True)
        result = accumulate_gradients(placed, objective, batches, totals, seed=0, step=step, total_steps=scenario.steps, phases=Phases())
        if step == scenario.steps - 1:
            outcome.gradients = full({n: t for name, p in placed.parameters() for n, t in placed.logical(name, p.grad)})  # type: ignore[arg-type]
        norm = placed.clip_gradients(scenario.clip_norm)
        optimizer.step()
        for name, layer in placed.model.moe_layers().items():
            layer.router.end_step(result.statistics[name])
        placed.end_step(result.statistics)
        reshard(placed, optimizer, step + 1)
        outcome.losses.append(result.loss)
        outcome.totals.append(result.loss_total)
        outcome.norms.append(norm.item())
        outcome.selected.append({name: layer.selected.tolist() for name, layer in result.statistics.items()})
    outcome.parameters = full(parameters_of(placed))
    return outcome


def parameters_of(placed: ParallelModel) -> dict[str, Tensor]:
    """Logical parameters and buffers of this rank."""
    tensors = {n: t for name, p in placed.parameters() for n, t in placed.logical(name, p)}
    return {**tensors, **dict(placed.model.named_buffers())}


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies, DTensors gathered (collective: all ranks have the same DTensor keys in the same order)."""
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}


def merge(outcomes: list[Outcome]) -> Outcome:
    """One outcome from all ranks': figures must agree exactly, tensors are united."""
    first = outcomes[0]
    for other in outcomes[1:]:
        assert (first.losses, first.norms, first.selected) == (other.losses, other.norms, other.selected), "ranks disagree"
        first.gradients.update(other.gradients)
        first.parameters.update(other.parameters)
    return first
