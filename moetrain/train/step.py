"""One optimizer step: the only place where losses of micro-batches and ranks become one gradient.

N valid tokens in the whole step, W data-parallel ranks: the local loss is W * (sum over local tokens) / N, and
gradients are averaged over W, so the result is the gradient of the mean over all tokens whatever the layout. Tensor
ranks compute the same loss together: each takes an equal share of it into its backward, and gradients sum the shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.context import ForwardContext, LayerStatistics
from moetrain.objectives.batch import IGNORE, Batch
from moetrain.objectives.language_modeling import ObjectiveTerms
from moetrain.parallel.parallelize import ParallelModel
from moetrain.train.metrics import Phases

Objective = Callable[..., ObjectiveTerms]


@dataclass
class StepResult:
    """Global figures of a step, the same on every rank.

    loss: mean of the main objective per valid token. terms: the other terms as they enter loss_total.
    statistics: by MoE layer, summed over all ranks and micro-batches.
    """

    loss: float
    terms: dict[str, float]
    tokens: int
    statistics: dict[str, LayerStatistics]
    """On the host, of all ranks."""

    @property
    def loss_total(self) -> float:
        return self.loss + sum(self.terms.values())


@dataclass(frozen=True)
class Totals:
    """Units of the whole step, over all ranks and micro-batches."""

    tokens: int
    sequences: int
    micro_steps: int

    def by_scope(self) -> dict[str, float]:
        return {"token": max(1, self.tokens), "sequence": max(1, self.sequences), "micro_step": self.micro_steps}


def all_sum(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over ranks, in place; the identity on one process."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def count_units(batches: Sequence[Batch], placed: ParallelModel, flags: Sequence[int] = ()) -> tuple[Totals, list[int]]:
    """Totals of the step, and ``flags`` summed over all ranks in the same collective."""
    valid = [batch.targets != IGNORE for batch in batches]
    tokens = sum(int(v.sum()) for v in valid)
    sequences = sum(int(v.any(dim=1).sum()) for v in valid)
    sums = all_sum(torch.tensor([tokens, sequences, *flags], device=placed.device), placed.world).tolist()
    tensor = placed.layout.tensor  # that many ranks have counted the same tokens
    return Totals(sums[0] // tensor, sums[1] // tensor, len(batches)), sums[2:]


def on_device(batch: Batch, placed: ParallelModel, *, training: bool, seed: int, step: int, total_steps: int,
              totals: Totals | None = None) -> tuple[Batch, ForwardContext]:  # fmt: skip
    """A micro-batch from CPU on the model's device, and its forward context. Which targets count is not read from a device."""
    valid, batch = batch.valid(), batch.to(placed.device)
    ctx = ForwardContext(
        batch_size=batch.tokens.shape[0],
        seq_len=batch.tokens.shape[1],
        valid=None if valid is None else valid.to(placed.device, non_blocking=True),
        sample=batch.sample,
        token_id=batch.tokens.reshape(-1),
        step=step,
        total_steps=total_steps,
        seed=seed,
        training=training,
        world_size=placed.layout.data_world_size,
        totals=None if totals is None else totals.by_scope(),
        reducer=placed.reducer,
    )
    return batch, ctx


def accumulate_gradients(
    placed: ParallelModel,
    objective: Objective,
    batches: Sequence[Batch],
    totals: Totals,
    *,
    seed: int,
    step: int,
    total_steps: int,
    phases: Phases,
) -> StepResult:
    """Forward and backward over this rank's micro-batches; leaves finished global gradients in ``.grad``."""
    world = placed.layout.data_world_size
    tokens = max(1, totals.tokens)
    main = torch.zeros((), dtype=torch.float64, device=placed.device)
    terms: dict[str, Tensor] = {}
    statistics: dict[str, LayerStatistics] = {}
    for batch in batches:
        batch, ctx = on_device(batch, placed, training=True, seed=seed, step=step, total_steps=total_steps, totals=totals)
        with phases("forward"):
            sums = objective(placed.model, batch, ctx)
            ctx.losses.update({name: value * (world / tokens) for name, value in sums.extra.items()})
            total = sums.main * (world / tokens) + sum(ctx.losses.values())
        with phases("backward"):
            (total / placed.layout.tensor).backward()
        main += sums.main.detach()
        for name, value in ctx.losses.items():
            terms[name] = terms.get(name, 0.0) + value.detach().double()
        for name, layer in ctx.statistics.items():
            statistics[name] = statistics[name] + layer if name in statistics else layer
    with phases("gradients"):
        placed.finish_gradients()
    reduced = reduce_statistics({"main": main / tokens, **{n: v / world for n, v in terms.items()}}, statistics, placed)
    scalars, statistics = reduced
    return StepResult(scalars.pop("main"), scalars, totals.tokens, statistics)


def reduce_statistics(
    scalars: dict[str, Tensor], statistics: dict[str, LayerStatistics], placed: ParallelModel
) -> tuple[dict[str, float], dict[str, LayerStatistics]]:
    """Sum scalars and layer statistics over data-parallel ranks in one collective (float64 holds counts up to 2^53), and bring them
    to the host at once: reading each figure of each layer by itself would cost a GPU's queue as many waits."""
    parts = [torch.stack([v.double() for v in scalars.values()])]
    for layer in statistics.values():
        parts += [layer.selected, layer.dispatched, layer.entropy.view(1), layer.tokens.view(1), layer.router]
    flat = all_sum(torch.cat([part.double() for part in parts]), placed.data).cpu()
    sizes = [part.numel() for part in parts]
    values, *rest = flat.split(sizes)
    layers = {}
    for i, name in enumerate(statistics):
        selected, dispatched, entropy, tokens, router = rest[5 * i : 5 * i + 5]
        layers[name] = LayerStatistics(selected.long(), dispatched.long(), entropy[0], tokens[0].long(), router)
    return dict(zip(scalars, values.tolist(), strict=True)), layers


@torch.no_grad()
def evaluate_loss(placed: ParallelModel, objective: Objective, batches: Iterable[Batch]) -> tuple[float, int]:
    """Mean loss in nats per valid token over held-out batches, and the number of tokens. Collective."""
    placed.model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=placed.device)
    for batch in batches:
        batch, ctx = on_device(batch, placed, training=False, seed=0, step=0, total_steps=1)
        sums[0] += objective(placed.model, batch, ctx).main
        sums[1] += (batch.targets != IGNORE).sum()
    placed.reshard()
    placed.model.train()
    loss, tokens = all_sum(sums, placed.data).tolist()
    return loss / max(1.0, tokens), int(tokens)
