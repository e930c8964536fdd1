"""Executing a routing: rows to experts, one grouped computation, weighted sum back.

:class:`LocalExecutor` has every expert at hand; executors that move rows or weights between ranks live in
``moetrain.parallel`` and share the index arithmetic here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moetrain.moe.context import RouterContext
from moetrain.moe.experts import Experts
from moetrain.moe.routing import PAD, Routing
from moetrain.ops.expert_sets import ExpertSet
from moetrain.ops.permute import Rows
from moetrain.ops.sort import sort_by_expert


class Executor(Protocol):
    """y [T, D'] = sum over a token's entries of weight * expert(x [T, D]), zero-computation experts left out."""

    def __call__(self, x: Tensor, routing: Routing, experts: Experts, ctx: RouterContext) -> Tensor: ...

    def prefetch(self, experts: Experts, ctx: RouterContext) -> None:
        """Called before the mixer in front of the layer: whatever can travel under it may start now."""
        ...


@dataclass(frozen=True)
class Order:
    """Entries of a routing sorted by where their expert is computed.

    entry: [n] int64, the routing's entry of each sorted row. rows: the tokens of these rows. counts: [E] int64 rows per
    place.
    """

    entry: Tensor
    rows: Rows
    counts: Tensor


@dataclass(frozen=True)
class AllEntries:
    """All entries of a routing, sorted; how many of them are computed is known on the device only.

    order, place: [N] int64, the entries with those left out last, and the inverse. counts: [E] int64 rows per place.
    complete: none is left out.
    """

    routing: Routing
    order: Tensor
    place: Tensor
    counts: Tensor
    complete: bool

    def take(self, num_rows: int) -> Order:
        """The entries that are computed. num_rows: the sum of the counts."""
        routing = self.routing
        if self.complete and routing.top_k is not None:
            return Order(self.order, Rows(routing.token[self.order], self.place, None, routing.num_tokens), self.counts)
        entry = self.order[:num_rows]
        return Order(entry, Rows.of(routing.token[entry], routing.num_tokens), self.counts)


def sort_all_entries(routing: Routing, position: Tensor | None = None) -> AllEntries:
    """Sort the entries of a routing by expert, or by ``position`` [E] (rank of each expert in the wanted order), without waiting for
    the device.

    PAD entries and zero-computation kinds are left out; whether there are any is known beforehand unless the routing is padded.
    """
    experts = routing.num_experts
    key = routing.expert
    if position is not None:
        table = torch.cat([position, torch.arange(experts, routing.selected.numel() + 1, device=position.device)])
        table[-1] = -1  # index PAD = -1 reads the last entry
        key = table[key]
    complete = not routing.padded and routing.selected.numel() == experts
    if not complete:
        key = torch.where(key < experts, key, PAD)
    order, counts, place = sort_by_expert(key, experts)
    return AllEntries(routing, order, place, counts, complete)


def sort_entries(routing: Routing, position: Tensor | None = None) -> Order:
    """Sort the entries of a routing, see :func:`sort_all_entries`. The host waits for the number of rows if some may be left out."""
    every = sort_all_entries(routing, position)
    return every.take(every.order.numel() if every.complete else int(every.counts.sum()))


class LocalExecutor:
    """All experts are on this rank."""

    def prefetch(self, experts: Experts, ctx: RouterContext) -> None:
        """Nothing has to travel."""

    def __call__(self, x: Tensor, routing: Routing, experts: Experts, ctx: RouterContext) -> Tensor:
        order = sort_entries(routing)
        return experts.execute(x, order.rows, routing.weight[order.entry], [ExpertSet(experts.weights(), order.counts)])
