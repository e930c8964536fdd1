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


def sort_entries(routing: Routing, position: Tensor | None = None) -> Order:
    """Sort the entries of a routing by expert, or by ``position`` [E] (rank of each expert in the wanted order).

    PAD entries and zero-computation kinds are left out; whether there are any is known without looking at the
    device unless the routing is padded.
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
    if complete and routing.top_k is not None:
        return Order(order, Rows(routing.token[order], place, None, routing.num_tokens), counts)
    order = order if complete else order[: int(counts.sum())]
    return Order(order, Rows.of(routing.token[order], routing.num_tokens), counts)


class LocalExecutor:
    """All experts are on this rank."""

    def prefetch(self, experts: Experts, ctx: RouterContext) -> None:
        """Nothing has to travel."""

    def __call__(self, x: Tensor, routing: Routing, experts: Experts, ctx: RouterContext) -> Tensor:
        order = sort_entries(routing)
        return experts.execute(x, order.rows, routing.weight[order.entry], [ExpertSet(experts.weights(), order.counts)])
