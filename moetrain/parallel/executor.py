"""Executing a routing under a placement: tokens travel to a rank that holds a copy of their expert.

One executor for every layout of experts; what differs is the plan. Owners only is expert parallelism: all tokens
move. Every expert everywhere is ZeRO-3 on experts: all weights move. Anything in between is FSSDP (Hecate,
2502.02581). The plan's copies live from the moment their transfer starts, before the mixer in front of the layer,
until their gradients are on the way to the owners.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from moetrain.moe.context import RouterContext
from moetrain.moe.execution import sort_all_entries
from moetrain.moe.experts import Experts
from moetrain.moe.routing import Routing
from moetrain.ops.expert_sets import ExpertSet
from moetrain.ops.permute import Rows, combine_rows, gather_rows
from moetrain.parallel.collectives import Exchange, Peers, gather_counts
from moetrain.parallel.indices import on_device, ranges, regroup
from moetrain.parallel.node_dispatch import NodePlan, plan_nodes, through_nodes
from moetrain.parallel.placement.cost import Transport
from moetrain.parallel.placement.plan import Cluster, Integers, PlacementPlan
from moetrain.parallel.placement.scheduler import Observation
from moetrain.parallel.transport import PendingGather, PendingReduce, Route, Transfer

RETURNING = 2
"""Sums of gradients that are under way at one time: one travels while the next is computed."""

Split = Callable[[Integers, PlacementPlan, Cluster], Integers]
"""counts [R, E] rows that each rank has for each expert -> [R, E, R] how many of them it sends to each rank."""


@dataclass(frozen=True)
class Links:
    """Communicators over the same ranks, one per stream of traffic: transfers of weights must not queue behind tokens.

    returning: copies of all layers whose gradients are on the way to their owners, oldest first.
    """

    tokens: Peers
    gather: Peers
    reduce: Peers
    cluster: Cluster
    returning: deque[Copies] = field(default_factory=deque, repr=False, compare=False)


@dataclass(frozen=True)
class Chunk:
    """One part of a dispatch: rows sent to and received from each rank, and received rows per slot, [R, slots]. On the host."""

    send: list[int]
    receive: list[int]
    arriving: Integers


@dataclass(frozen=True)
class Dispatch:
    """The discrete side of one execution: everything that a recomputed pass must find unchanged.

    entry: [n] int64, the routing's entry of each row in sending order. rows: their tokens. copied: plans of the copies
    that are needed, by the time at which they start to travel. nodes: indices of a dispatch in two hops, instead of chunks.
    """

    entry: Tensor
    rows: Rows
    chunks: list[Chunk]
    copied: dict[str, PlacementPlan]
    nodes: NodePlan | None
    seen: Observation


class Copies:
    """Copies of one layer's experts on this rank for one forward and backward pass, or for all passes of a step.

    buffer: [copied experts, elements of an expert], or None before it arrives and after it is freed. keep: hold copies
    and the sum of their gradients until :meth:`post_gradients`.
    """

    def __init__(
        self, plan: PlacementPlan, experts: Experts, links: Links, *, dtype: torch.dtype, transport: Transport, keep: bool = False
    ) -> None:
        self.plan, self.keep = plan, keep
        self.accumulated: Tensor | None = None
        self.weights = experts.weights()
        self.links, self.dtype = links, dtype
        self.sizes = [w[0].numel() if w.shape[0] else int(np.prod(w.shape[1:])) for w in self.weights]
        route = Route.of(plan, links.cluster, transport)
        self.transfer, self.reduction = (Transfer(plan, route, sum(self.sizes), peers) for peers in (links.gather, links.reduce))
        self.buffer: Tensor | None = None
        self.pending: PendingGather | None = None
        self.reduced: PendingReduce | None = None
        self.before: Copies | None = None

    def post(self) -> None:
        """Start the transfer, unless the copies are here or on their way."""
        if self.buffer is None and self.pending is None:
            # a list as an index would be copied to a GPU while the host waits for all that is queued there
            index = on_device(np.asarray(self.transfer.rows, dtype=np.int64), self.weights[0].device)
            with torch.no_grad():
                rows = torch.cat([w.index_select(0, index).flatten(1).to(self.dtype) for w in self.weights], dim=1)
            self.pending = self.transfer.gather(rows)

    def wait(self) -> Tensor:
        """The copies, [copied experts, elements]."""
        if self.buffer is None:
            self.post()
            assert self.pending is not None
            self.buffer, self.pending = self.pending.wait(), None
        return self.buffer

    def views(self) -> tuple[Tensor, ...]:
        """The copies as stacked weights, one tensor per parameter of the experts."""
        parts = self.wait().split(self.sizes, dim=1)
        return tuple(part.unflatten(1, w.shape[1:]) for part, w in zip(parts, self.weights, strict=True))

    def free(self) -> None:
        """Give the memory back; a later :meth:`wait` fetches the copies again."""
        self.buffer = None

    def return_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Start summing the copies' gradients to the owners, and free the copies. With re-materialisation the copies of
        the layer before start to travel: they have the backward of the mixer in between to arrive."""
        flat = torch.cat([g.flatten(1) for g in gradients], dim=1)
        if self.keep:
            self.accumulated = flat.to(torch.promote_types(flat.dtype, torch.float32)) + (
                0 if self.accumulated is None else self.accumulated
            )
            return
        self.free()
        self.send_gradients(flat)
        if self.before is not None and self.before.buffer is None:
            self.before.post()

    def post_gradients(self) -> None:
        """Start summing what has been accumulated, and free the copies."""
        if self.accumulated is not None:
            self.free()
            flat, self.accumulated = self.accumulated, None
            self.send_gradients(flat)

    def send_gradients(self, flat: Tensor) -> None:
        """Start the sum, after that of the copies before last is done: buffers of a few copies exist, not of all layers."""
        returning = self.links.returning
        while len(returning) >= RETURNING:
            returning[0].add_gradients()
        self.reduced = self.reduction.reduce(flat)
        returning.append(self)

    def add_gradients(self) -> None:
        """Wait for the sums and add them to the owned parameters' gradients."""
        if self.reduced is None:
            return
        row = {int(expert): i for i, expert in enumerate(self.plan.owned(self.links.reduce.rank))}
        for expert, flat in self.reduced.wait().items():
            for weight, part in zip(self.weights, flat.split(self.sizes), strict=True):
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
                weight.grad[row[expert]] += part.view(weight.shape[1:])
        self.reduced = None
        self.links.returning.remove(self)


def kept_out_of_the_graph(copies: Sequence[Copies]) -> AbstractContextManager[Any]:
    """While the experts run, autograd keeps a reference to these objects instead of the copies' memory: freed after the
    forward, they are fetched again in the backward. (Whatever else is saved meanwhile stays as it is, but torch does not check
    then whether it has changed.)"""
    by_storage = {c.wait().untyped_storage().data_ptr(): c for c in copies}

    def pack(tensor: Tensor) -> Any:
        found = by_storage.get(tensor.untyped_storage().data_ptr())
        if found is None or not tensor.numel():
            return tensor
        return found, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        found, *place = saved
        return found.wait().as_strided(*place)

    return saved_tensors_hooks(pack, unpack)


class _CopiedWeights(torch.autograd.Function):
    """The copies as tensors with a gradient. It goes to the owners by SparseReduceScatter and not through autograd: the
    owned parameters among the inputs only make sure that every rank has this node."""

    @staticmethod
    def forward(ctx: Any, copies: Copies, *owned: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.copies = copies
        return copies.views()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        ctx.copies.return_gradients(gradients)
        return (None,) * (1 + len(gradients))


class PlacedExecutor:
    """owner: [E] rank of each expert. dtype: in which experts compute, and copies travel. split: who computes which rows,
    given a plan with copies. rematerialize: free the copies after the forward pass and fetch them again for the backward.
    recompute: the layer lies in a region of activation checkpointing. degree: chunks in which tokens travel, so that one is
    computed while others are under way. deduplicate: a token crosses to each node once (``node_dispatch``). keep: one
    transfer of copies and of their gradients per step, not per micro-batch. calibrate: given the true counts, a plan with
    further copies, which travel after the router and before the tokens.
    """

    def __init__(
        self,
        owner: Sequence[int] | Integers,
        links: Links,
        device: torch.device,
        *,
        dtype: torch.dtype,
        split: Split,
        transport: Transport = "direct",
        rematerialize: bool = False,
        recompute: bool = False,
        degree: int = 1,
        deduplicate: bool = False,
        keep: bool = False,
        calibrate: Callable[[Integers, PlacementPlan], PlacementPlan] | None = None,
    ) -> None:
        self.links, self.device, self.dtype, self.split, self.transport = links, device, dtype, split, transport
        self.rematerialize, self.recompute, self.degree = rematerialize, recompute, degree
        self.deduplicate, self.keep, self.calibrate = deduplicate, keep, calibrate
        self.plan = PlacementPlan.owners_only(owner, links.tokens.size)
        self.seen: Observation | None = None
        """What training passes have dispatched since the last :meth:`take_observation`."""
        self.live: list[Copies] = []
        """Copies whose gradients have not been added yet."""
        self.kept: Copies | None = None

    @property
    def plan(self) -> PlacementPlan:
        return self._plan

    @plan.setter
    def plan(self, plan: PlacementPlan) -> None:
        """Takes effect in the next forward pass; passes under way keep theirs."""
        self._plan, self.kept = plan, None
        # position[expert]: its place when experts are listed by owner
        order = np.concatenate([plan.owned(rank) for rank in range(plan.num_ranks)])
        self.place = np.argsort(order)
        self.position = on_device(self.place, self.device)
        # of the router's ids, which several may share an expert
        self.router_position = self.position if plan.remap is None else self.position[on_device(plan.remap, self.device)]

    def prefetch(self, experts: Experts, ctx: RouterContext) -> None:
        """Start the transfer of this pass's copies."""
        if self.plan.copies.any():
            self.copies(self.plan, experts, ctx).post()

    def copies(self, plan: PlacementPlan, experts: Experts, ctx: RouterContext, site: str = "planned") -> Copies:
        """The copies of this pass, the same object for its recomputation and backward."""
        found: dict[tuple[str, str], Copies] = ctx.handles.setdefault("placement", {})
        if (ctx.name, site) in found:
            return found[ctx.name, site]
        keep = self.keep and torch.is_grad_enabled() and site == "planned"
        copies = self.kept if keep else None
        if copies is None:
            copies = Copies(plan, experts, self.links, dtype=self.dtype, transport=self.transport, keep=keep)
            if torch.is_grad_enabled():
                self.live.append(copies)
                if self.rematerialize and not self.recompute:
                    copies.before = next(reversed(found.values()), None)
        if keep:
            self.kept = copies
        found[ctx.name, site] = copies
        return copies

    def take_observation(self) -> Observation | None:
        """The loads of the training passes of a step, which start from zero again."""
        seen, self.seen = self.seen, None
        return seen

    def post_gradients(self) -> None:
        """After the last backward of a step: start the transfers that waited for it."""
        for copies in self.live:
            copies.post_gradients()

    def add_gradients(self) -> None:
        """Then: add what copies have sent to the owned parameters' gradients."""
        for copies in self.live:
            copies.add_gradients()
        self.live.clear()

    def __call__(self, x: Tensor, routing: Routing, experts: Experts, ctx: RouterContext) -> Tensor:
        plan = ctx.once("dispatch", lambda: self.dispatch(routing))
        if ctx.training and not ctx.forward.recomputing:
            self.seen = plan.seen if self.seen is None else self.seen + plan.seen
        copies = [self.copies(p, experts, ctx, site) for site, p in plan.copied.items()]
        weights = [experts.weights(), *(_CopiedWeights.apply(c, *experts.weights()) for c in copies)]
        weight = routing.weight[plan.entry]
        nodes = plan.nodes
        if nodes is None:
            y = self.exchange(x, weight, plan, weights, experts, copies)
        else:
            compute = lambda rows: self.arrived(rows, nodes.arriving, weights, experts, copies)  # noqa: E731
            y = through_nodes(x, weight, nodes, self.links.tokens, compute)

        for c in copies if self.rematerialize or not torch.is_grad_enabled() else ():
            # inside activation checkpointing the graph of the recomputed pass keeps the copies until the backward
            c.free()
            if y.requires_grad and not self.recompute:
                y.register_hook(lambda _, c=c: c.post())
        return y

    def exchange(
        self,
        x: Tensor,
        weight: Tensor,
        plan: Dispatch,
        weights: Sequence[tuple[Tensor, ...]],
        experts: Experts,
        copies: Sequence[Copies],
    ) -> Tensor:
        """Rows to the ranks that compute them and back, chunk by chunk; their weighted sum by token, [T, D]."""
        rows = gather_rows(x, plan.rows)
        exchanges = [
            (Exchange(c.send, c.receive, self.links.tokens, "dispatch"), Exchange(c.receive, c.send, self.links.tokens, "combine"))
            for c in plan.chunks
        ]
        sent = [there.start(part) for (there, _), part in zip(exchanges, rows.split([sum(c.send) for c in plan.chunks]), strict=True)]
        returned = []
        for (there, back), started, chunk in zip(exchanges, sent, plan.chunks, strict=True):
            returned.append(back.start(self.arrived(there.finish(started), chunk.arriving, weights, experts, copies)))
        parts = [back.finish(started) for (_, back), started in zip(exchanges, returned, strict=True)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return combine_rows(y, weight, plan.rows)

    def arrived(
        self, rows: Tensor, arriving: Integers, weights: Sequence[tuple[Tensor, ...]], experts: Experts, copies: Sequence[Copies]
    ) -> Tensor:
        """Rows as they arrive, by source and slot, through the experts and back into that order."""
        there, counts = regroup(arriving, self.device), arriving.sum(axis=0)
        sizes = [w[0].shape[0] for w in weights]
        of_sets, num_rows = on_device(counts, self.device).split(sizes), np.split(counts, np.cumsum(sizes)[:-1])
        sets = [ExpertSet(w, part, int(rows_of.sum())) for w, part, rows_of in zip(weights, of_sets, num_rows, strict=True)]
        forget = self.rematerialize and not self.recompute and torch.is_grad_enabled() and copies
        with kept_out_of_the_graph(copies) if forget else nullcontext():
            y = experts.execute(rows, there, None, sets)
        if forget:
            # in the backward every rank waits here: one that has no rows for its copies would not ask for them, and never
            # start the stages of their transfer in which it passes on what others need
            y.register_hook(lambda _: [c.wait() for c in copies] and None)
        return y

    def dispatch(self, routing: Routing) -> Dispatch:
        """Who sends what to whom, from one all-gather of counts."""
        rank = self.links.tokens.rank
        every = sort_all_entries(routing, self.router_position)
        # the one host copy of this layer: every split follows from these integers, the same on all ranks
        gathered = gather_counts(every.counts[: self.plan.num_experts], self.links.tokens).cpu().numpy()
        order = every.take(int(gathered[rank].sum()))
        counts = gathered[:, self.place]
        copied = {"planned": self.plan} if self.plan.copies.any() else {}
        plan = self.plan if self.calibrate is None else self.calibrate(counts, self.plan)
        if plan is not self.plan:
            copied["late"] = replace(plan, holders=plan.holders & ~self.plan.copies)
        slots = [np.concatenate([plan.owned(r), *(p.copied(r) for p in copied.values())]) for r in range(plan.num_ranks)]
        rows = self.split(counts, plan, self.links.cluster) if copied else np.where(plan.holders, counts[:, :, None], 0)
        ends = [rows * (c + 1) // self.degree - rows * c // self.degree for c in range(self.degree)]
        chunks = [self.chunk(part, slots[rank], rank) for part in ends]
        entry, sent = order.entry, order.rows
        if copied or self.degree > 1:
            permutation = self.permutation(rows[rank], [part[rank] for part in ends], slots, gathered[rank])
            entry, sent = entry[permutation], sent.reordered(permutation)
        nodes = None
        if self.deduplicate:
            nodes = plan_nodes(sent.token, rows, slots[rank], routing.num_tokens, self.links.cluster, self.links.tokens)
        return Dispatch(entry, sent, chunks, copied, nodes, Observation(counts, rows.sum(axis=(0, 1))))

    def chunk(self, rows: Integers, slots: Integers, rank: int) -> Chunk:
        """This rank's side of moving rows [R, E, R]. slots: its experts in their order."""
        arriving = np.ascontiguousarray(rows[:, slots, rank])
        return Chunk(send=rows[rank].sum(axis=0).tolist(), receive=rows[:, :, rank].sum(axis=1).tolist(), arriving=arriving)

    def permutation(self, rows: Integers, chunks: Sequence[Integers], slots: Sequence[Integers], sorted_counts: Integers) -> Tensor:
        """From sending order (by chunk, destination, slot of the destination) to the order sorted by position: [n] int64.

        rows, chunks: [E, R] rows of each expert for each rank, in all and per chunk.
        """
        first = np.concatenate([[0], np.cumsum(sorted_counts)])[self.place]  # where each expert's rows begin
        begin = first[:, None] + np.cumsum(rows, axis=1) - rows  # [E, R] and those for each rank
        starts, lengths = [], []
        for part in chunks:
            for destination, ids in enumerate(slots):
                starts.append(begin[ids, destination])
                lengths.append(part[ids, destination])
            begin = begin + part
        return ranges(np.concatenate(starts), np.concatenate(lengths), self.device)
