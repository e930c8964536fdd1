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
from moetrain.moe.routing import Routing
from moetrain.ops.permute import Rows, inverse_permutation


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
    narrow = torch.uint8 if complete and experts <= 256 else torch.int32 if not complete or experts > 32767 else torch.int16
    order = key.to(narrow).argsort(stable=True)
    counts = torch.bincount(key + 1, minlength=experts + 1)
    if not complete:
        first, kept = counts[:1].sum(), counts[1 : experts + 1].sum()
        order = order[int(first) : int(first + kept)]
    token = routing.token[order]
    if complete and routing.top_k is not None:
        rows = Rows(token, inverse_permutation(order), None, routing.num_tokens)
    else:
        rows = Rows.of(token, routing.num_tokens)
    return Order(entry=order, rows=rows, counts=counts[1 : experts + 1])


class LocalExecutor:
    """All experts are on this rank."""

    def prefetch(self, experts: Experts, ctx: RouterContext) -> None:
        """Nothing has to travel."""

    def __call__(self, x: Tensor, routing: Routing, experts: Experts, ctx: RouterContext) -> Tensor:
        order = sort_entries(routing)
        return experts.execute(x, order.rows, routing.weight[order.entry], order.counts, experts.weights())
