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
from moetrain.parallel.profile import LinearCost, Machine, MachineProfile
from moetrain.parallel.ranks import Ranks
from moetrain.parallel.reshard import reshard
from moetrain.train.metrics import Phases
from moetrain.train.optim import AdamWConfig
from moetrain.train.step import StepResult, accumulate_gradients, count_units


@dataclass
class Scenario:
    """A model, its parts and how to train it. micro_batch_size: None for all of a rank's sequences at once.

    pad: of each batch, the last quarter of the sequences has no targets in its second half, the last eighth none at all.
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


SLOW_COMPUTE = MachineProfile(
    Machine(
        world_size=4,
        ranks_per_node=2,
        backend="gloo",
        device="assumed",
        dtype="float32",
        torch_version=torch.__version__,
        date="2000-01-01",
    ),
    intra={"all_to_all": LinearCost(0.0, 1e-12)},
    inter={"all_to_all": LinearCost(0.0, 1e-11)},
    experts=LinearCost(0.0, 1e-6),
    num_experts=1,
)
"""A machine on which copies pay in spite of the small models: any real one has latencies that outweigh all they can save."""


@dataclass
class Outcome:
    """Per step: loss, loss_total, gradient norm, tokens per expert by layer. Of the last step: logical gradients, and the
    final hidden states [S, D] by sequence; after it: logical parameters (and buffers)."""

    losses: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    selected: list[dict[str, list[int]]] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)


def synthetic_batch(scenario: Scenario, step: int, index: Tensor) -> Batch:
    """Sequences ``index`` of the global batch of a step, the same on every rank that asks for them."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(scenario.vocab_size, (scenario.batch_size, scenario.seq_len + 1), generator=generator)
    # a token that only sees its like has its hidden state but for rounding, and experts that choose tokens would meet a tie
    same = tokens[:, 0] == tokens[:, 1]
    tokens[same, 1] = (tokens[same, 1] + 1) % scenario.vocab_size
    if scenario.repeat_token:
        tokens[:] = tokens[:1, :1]
    targets = tokens[:, 1:].clone()
    if scenario.pad:
        eighth = max(1, scenario.batch_size // 8)
        targets[-2 * eighth :, scenario.seq_len // 2 :] = IGNORE
        targets[-eighth:] = IGNORE
    return Batch(tokens[index, :-1], targets[index], step * scenario.batch_size + index)


def local_batches(scenario: Scenario, step: int, ranks: Ranks) -> list[Batch]:
    """A data-parallel rank's micro-batches, cut as :class:`moetrain.train.data.BatchPlan` does."""
    micro = scenario.micro_batch_size or scenario.batch_size // ranks.world_size
    count = scenario.batch_size // (micro * ranks.world_size)
    firsts = [(i * ranks.world_size + ranks.rank) * micro for i in range(count)]
    return [synthetic_batch(scenario, step, torch.arange(first, first + micro)) for first in firsts]


Plans = Callable[[PlacedExecutor, str, int], PlacementPlan]
"""(executor, layer, step) -> the plan of that step"""


@dataclass
class Training:
    """A scenario in training on this rank of a layout."""

    scenario: Scenario
    ranks: Ranks
    placed: ParallelModel
    optimizer: torch.optim.Optimizer
    outputs: list[Tensor] = field(default_factory=list)
    """Final hidden states [B * S, D] of the last step's micro-batches."""

    @classmethod
    def start(cls, rank: int, scenario: Scenario, layout: Layout, seed: int = 0) -> Training:
        """Build and place the model, allocate the optimizer. Collective."""
        ranks = Ranks(rank, layout.world_size, rank, layout.world_size)
        with torch.device("meta"):
            model = scenario.model.build(scenario.parts, vocab_size=scenario.vocab_size, dtype=scenario.dtype)
        placed = parallelize(model, layout, ranks, device=torch.device("cpu"), recompute=scenario.recompute, profile=SLOW_COMPUTE)
        placed.initialise(seed)
        placed.model.train()
        training = cls(scenario, ranks, placed, AdamWConfig(lr=scenario.lr).build(placed))
        model.norm.register_forward_hook(lambda module, args, x: training.outputs.append(x.detach()))
        return training

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        return local_batches(self.scenario, step, self.ranks.data_parallel(self.placed.layout.tensor))

    def gradients(self, step: int, plans: Plans | None = None) -> StepResult:
        """Forward and backward of a step (from 0). plans: replaces the layout's planner."""
        placed, batches = self.placed, self.batches(step)
        self.outputs.clear()
        totals, _ = count_units(batches, placed)
        for layer in placed.model.moe_layers().values():
            layer.router.begin_step(step, self.scenario.steps)
        placed.begin_step()
        if plans is not None:
            for name, executor in placed.executors().items():
                executor.plan = plans(executor, name, step)
        self.optimizer.zero_grad(set_to_none=True)
        objective, steps = self.scenario.objective.build(), self.scenario.steps
        return accumulate_gradients(placed, objective, batches, totals, seed=0, step=step, total_steps=steps, phases=Phases())

    def update(self, step: int, result: StepResult) -> float:
        """The rest of the step: clip, update, move owners. Returns the gradient norm."""
        norm = self.placed.clip_gradients(self.scenario.clip_norm).item()
        self.optimizer.step()
        for name, layer in self.placed.model.moe_layers().items():
            layer.router.end_step(result.statistics[name])
        self.placed.end_step(result.statistics)
        reshard(self.placed, self.optimizer, step + 1)
        return norm


def train_steps(
    rank: int, world_size: int, scenario: Scenario, layout: str | Layout, replicate: int = 1, plans: Plans | None = None
) -> Outcome:
    """Train ``scenario.steps`` steps on this rank. Outputs, gradients and parameters are this rank's part; see ``merge``.

    plans: replaces the layout's planner.
    """
    chosen = layout if isinstance(layout, Layout) else Layout(layout, replicate, world_size // replicate)  # type: ignore[arg-type]
    training = Training.start(rank, scenario, chosen)
    placed, outcome = training.placed, Outcome()
    for step in range(scenario.steps):
        result = training.gradients(step, plans)
        if step == scenario.steps - 1:
            gradients = {name: p.grad for name, p in placed.parameters() if p.grad is not None}
            outcome.gradients = full({n: t for name, gradient in gradients.items() for n, t in placed.logical(name, gradient)})
            for batch, x in zip(training.batches(step), training.outputs, strict=True):
                first = x.view(-1, *batch.tokens.shape, x.shape[-1])[0]  # of the passes, if the objective has several
                outcome.outputs |= {f"sequence.{i}": y for i, y in zip(batch.sample.tolist(), first, strict=True)}
        outcome.norms.append(training.update(step, result))
        outcome.losses.append(result.loss)
        outcome.totals.append(result.loss_total)
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
    """One outcome from all ranks': figures must agree exactly, and weights that several have; tensors are united."""
    first = outcomes[0]
    for other in outcomes[1:]:
        assert (first.losses, first.norms, first.selected) == (other.losses, other.norms, other.selected), "ranks disagree"
        for name, tensor in other.parameters.items():
            assert torch.equal(first.parameters.get(name, tensor), tensor), f"ranks disagree in {name}"
        first.outputs.update(other.outputs)
        first.gradients.update(other.gradients)
        first.parameters.update(other.parameters)
    return first
