"""What a router, capacity policy or loss may know beyond its input, and the one way it reaches other ranks.

:class:`ForwardContext` belongs to one forward pass of one micro-batch; :class:`RouterContext` is its view from
one MoE layer. Nothing here imports ``torch.distributed``: reductions come in through ``reducer``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from moetrain.ops import noise

T = TypeVar("T")

Scope = Literal["token", "sequence", "micro_step", "rank"]
"""Over which tokens a rule looks. token, sequence: exact under any split of a batch. micro_step: all tokens
that the data-parallel world processes together. rank: this rank's tokens only, as some published code does."""


Granularity = Literal["token", "sequence", "pass"]
"""What draws noise of its own; pass: all tokens of a pass, on all ranks, draw the same."""


class Reducer(Protocol):
    """Sums over ranks."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the data-parallel world, differentiable (the gradient is summed as well)."""
        ...


class LocalReducer:
    """One process: a sum over the world is the identity."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


@dataclass
class LayerStatistics:
    """Sums over the valid tokens of a step at one MoE layer, before any reduction over ranks.

    selected, dispatched: [E'] int64. entropy: scalar, sum over tokens of the entropy of ``probs`` (nats).
    tokens: scalar int64. router: [n] float64, what the router itself wants summed (``step_sums`` in its routing's aux).
    """

    selected: Tensor
    dispatched: Tensor
    entropy: Tensor
    tokens: Tensor
    router: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        return LayerStatistics(
            self.selected + other.selected,
            self.dispatched + other.dispatched,
            self.entropy + other.entropy,
            self.tokens + other.tokens,
            self.router + other.router,
        )


class ForwardContext:
    """State of one forward pass over a micro-batch of B sequences of S tokens (T = B * S, batch-major).

    valid:    [T] bool, tokens that count; None if all do.
    sample:   [B] int64, global sample index of each sequence.
    token_id: [T] int64.
    step, total_steps, seed, pass_id: coordinates of counter-based noise; pass_id tells several passes over the
        same micro-batch apart. passes: the batch is that many equal copies one behind the other, see :meth:`repeated`.
    totals:   units of each scope in the whole optimizer step, over all ranks and accumulation steps; they turn
        a local mean into a share of the global one.
    world_size: data-parallel ranks.
    losses:   weighted auxiliary losses by name, summed over layers. statistics: by layer name.
    carry:    state that travels from layer to layer, by owner. A recomputed layer sees what it saw the first time, so
        entries are replaced, never changed in place. handles: what a layer keeps for its recomputation and backward.

    Not a dataclass on purpose: FSDP copies dataclasses among a module's arguments, and what a layer records in a
    copy is lost.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        seq_len: int,
        valid: Tensor | None = None,
        sample: Tensor | None = None,
        token_id: Tensor | None = None,
        step: int = 0,
        total_steps: int = 1,
        seed: int = 0,
        pass_id: int = 0,
        passes: int = 1,
        training: bool = False,
        world_size: int = 1,
        totals: Mapping[str, float] | None = None,
        reducer: Reducer | None = None,
    ) -> None:
        self.batch_size, self.seq_len = batch_size, seq_len
        self.valid, self.sample, self.token_id = valid, sample, token_id
        self.step, self.total_steps, self.seed, self.pass_id = step, total_steps, seed, pass_id
        self.passes = passes
        self.training = training
        self.world_size, self.totals = world_size, totals
        self.reducer: Reducer = reducer or LocalReducer()
        self.losses: dict[str, Tensor] = {}
        self.statistics: dict[str, LayerStatistics] = {}
        self.carry: dict[str, Any] = {}
        self.handles: dict[str, Any] = {}
        self.recomputing = False
        self._decisions: dict[tuple[str, str], Any] = {}

    def at(self, layer: str, family: str = "ffn") -> RouterContext:
        """The view of one MoE layer. layer: its dotted name in the model, e.g. ``layers.3``."""
        return RouterContext(forward=self, layer=layer, family=family)

    def repeated(self, passes: int) -> ForwardContext:
        """The context of one forward over ``passes`` copies of the batch, that differ by their pass id. It records losses
        and statistics here; each copy counts, so sums double and means stay."""

        def repeat(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.repeat(passes)

        sample = self.sample if self.sample is not None else torch.arange(self.batch_size)
        totals = None
        if self.totals is not None:
            totals = {scope: units if scope == "micro_step" else passes * units for scope, units in self.totals.items()}
        context = ForwardContext(
            batch_size=passes * self.batch_size,
            seq_len=self.seq_len,
            valid=repeat(self.valid),
            sample=repeat(sample),
            token_id=repeat(self.token_id),
            step=self.step,
            total_steps=self.total_steps,
            seed=self.seed,
            pass_id=self.pass_id,
            passes=passes,
            training=self.training,
            world_size=self.world_size,
            totals=totals,
            reducer=self.reducer,
        )
        context.losses, context.statistics = self.losses, self.statistics
        return context

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add a weighted auxiliary loss, once per pass (a recomputed forward adds nothing)."""
        if not self.recomputing:
            self.losses[name] = self.losses[name] + value if name in self.losses else value

    def valid_tokens(self, device: torch.device | None = None) -> Tensor:
        """Scalar int64: tokens of this micro-batch that count. device: where to put it if all do."""
        if self.valid is None:
            return torch.full((), self.batch_size * self.seq_len, device=device)
        return self.valid.sum()

    def valid_per_sequence(self) -> Tensor | None:
        """[B] int64: valid tokens of each sequence; None if all are valid."""
        return None if self.valid is None else self.valid.view(self.batch_size, self.seq_len).sum(1)


@dataclass(frozen=True)
class RouterContext:
    """One MoE layer's view of a forward pass; see :class:`ForwardContext` for the fields it shares."""

    forward: ForwardContext
    layer: str
    family: str = "ffn"

    @property
    def training(self) -> bool:
        return self.forward.training

    @property
    def valid(self) -> Tensor | None:
        return self.forward.valid

    @property
    def batch_size(self) -> int:
        return self.forward.batch_size

    @property
    def seq_len(self) -> int:
        return self.forward.seq_len

    @property
    def step(self) -> int:
        return self.forward.step

    @property
    def total_steps(self) -> int:
        return self.forward.total_steps

    @property
    def token_id(self) -> Tensor | None:
        return self.forward.token_id

    @property
    def carry(self) -> dict[str, Any]:
        """State that travels from MoE layer to MoE layer within the pass, by the name of its owner."""
        return self.forward.carry

    @property
    def handles(self) -> dict[str, Any]:
        """What outlives a layer's forward until its recomputation and backward, by the name of its owner."""
        return self.forward.handles

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.family}"

    def take_over(self, site: str) -> Tensor | None:
        """The tensor that the layer of this family before this one has handed over, with its gradient; None in the first."""
        return self.carry.get(f"{self.family}/{site}")

    def hand_over(self, site: str, state: Tensor) -> None:
        """Leave a tensor for the next layer of this family in the same pass."""
        self.carry[f"{self.family}/{site}"] = state

    def once(self, site: str, decide: Callable[[], T]) -> T:
        """The result of ``decide()``, evaluated without gradient, once per pass: a forward that activation
        checkpointing repeats gets the first pass's result back.

        Every discrete choice (expert indices, drops) goes through here, so near ties cannot flip in the
        recomputed pass and change the shapes that the backward expects.
        """
        key = (self.name, site)
        if self.forward.recomputing:
            return self.forward._decisions[key]
        with torch.no_grad():
            decision = decide()
        if torch.is_grad_enabled():
            self.forward._decisions[key] = decision
        return decision

    def uniform(
        self,
        site: str,
        width: int,
        *,
        per: Granularity = "token",
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Tensor:
        """Noise in [0, 1), [T, width]: a function of (seed, step, layer, site, pass), per sequence also of the sample, per
        token also of the position."""
        forward = self.forward
        sample = forward.sample if forward.sample is not None else torch.arange(forward.batch_size)
        site_key = f"{forward.seed}/{forward.step}/{self.name}/{site}"
        base = torch.zeros_like(sample) if per == "pass" else sample
        keys = [noise.hash_text(f"{site_key}/{forward.pass_id + i}") for i in range(forward.passes)]
        key = torch.cat([part + key for part, key in zip(base.chunk(forward.passes), keys, strict=True)])
        position = torch.arange(forward.seq_len, device=sample.device)
        token_key = noise.mix(key)[:, None] + (position if per == "token" else 0 * position)
        return noise.uniform(token_key.reshape(-1).to(device or sample.device), width, dtype)

    def reduce(self, tensor: Tensor, scope: Scope) -> Tensor:
        """Sum a statistic over the ranks of a scope; differentiable."""
        return self.forward.reducer.sum(tensor) if scope == "micro_step" else tensor

    def share(self, scope: Scope) -> float | Tensor:
        """What a local mean over the units of a scope must be multiplied by, so that averaging the gradients over
        the data-parallel world and summing over accumulation steps gives the gradient of the global mean."""
        forward = self.forward
        totals = forward.totals
        if totals is None:
            return 1.0
        if scope in ("micro_step", "rank"):
            return 1.0 / totals["micro_step"]
        if scope == "token":
            local: float | Tensor = forward.valid_tokens().double()
        else:
            per_sequence = forward.valid_per_sequence()
            local = forward.batch_size if per_sequence is None else (per_sequence > 0).sum().double()
        return forward.world_size * local / totals[scope]
