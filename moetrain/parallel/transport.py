"""SparseAllGather and SparseReduceScatter: moving copies of experts from their owners, and their gradients back.

Hecate (2502.02581) section 3 defines the pair; here each is a sequence of uneven all-to-alls, which run on every
backend and need no sub-groups. How the bytes travel is a :class:`Route`; gradients take the same way backwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.parallel.collectives import Peers, Work, count_traffic, start_all_to_all
from moetrain.parallel.placement.cost import Transport
from moetrain.parallel.placement.plan import Cluster, Integers, PlacementPlan, relays

Piece = tuple[int, int]
"""(expert, stripe)"""


@dataclass(frozen=True, order=True)
class Message:
    """One stripe of one expert from a rank to another."""

    source: int
    destination: int
    expert: int
    stripe: int = 0

    @property
    def piece(self) -> Piece:
        return self.expert, self.stripe


@dataclass(frozen=True)
class Route:
    """Stages of messages, each sorted. A rank gets each piece from one source, in one stage: a tree per piece."""

    stages: tuple[tuple[Message, ...], ...]
    stripes: int = 1

    @classmethod
    def of(cls, plan: PlacementPlan, cluster: Cluster, transport: Transport = "direct") -> Route:
        """The messages that turn owners into holders.

        direct: owners send to every holder. two_stage: once to each importing node, whose relay passes the expert on.
        striped: all ranks of the owner's node send at once, each one stripe, to the rank in its place of the importing
        node. :func:`moetrain.parallel.placement.cost.gather_traffic` counts the same messages without making them.
        """
        if transport == "direct":
            experts, ranks = np.nonzero(plan.copies)
            messages = (Message(int(plan.owner[e]), int(r), int(e)) for e, r in zip(experts, ranks, strict=True))
            return cls((tuple(sorted(messages)),))
        stripes = 1 if transport == "two_stage" else max(len(members) for members in cluster.members)
        stages: list[set[Message]] = [set(), set(), set()]
        relay = relays(plan, cluster)
        for expert in np.flatnonzero(plan.copies.any(axis=1)).tolist():
            if transport == "two_stage":
                _two_stage(stages, expert, plan, cluster, relay[expert])
            else:
                _striped(stages, expert, plan, cluster, stripes)
        return cls(tuple(tuple(sorted(stage)) for stage in stages if stage) or ((),), stripes)

    def cut(self, size: int) -> list[int]:
        """Elements of each stripe of an expert of ``size`` elements."""
        return [size * (i + 1) // self.stripes - size * i // self.stripes for i in range(self.stripes)]


def _two_stage(stages: list[set[Message]], expert: int, plan: PlacementPlan, cluster: Cluster, relay: Integers) -> None:
    owner = int(plan.owner[expert])
    for node, members in enumerate(cluster.members):
        holders = [int(r) for r in members if plan.copies[expert, r]]
        if node == cluster.node_of[owner]:
            stages[0].update(Message(owner, holder, expert) for holder in holders)
        elif holders:
            first = int(relay[node])
            stages[0].add(Message(owner, first, expert))
            stages[1].update(Message(first, holder, expert) for holder in holders if holder != first)


def _striped(stages: list[set[Message]], expert: int, plan: PlacementPlan, cluster: Cluster, stripes: int) -> None:
    owner = int(plan.owner[expert])
    home = cluster.node_of[owner]
    for node, members in enumerate(cluster.members):
        holders = [int(r) for r in members if plan.copies[expert, r]]
        for stripe in range(stripes):
            if node == home:
                stages[0].update(Message(owner, holder, expert, stripe) for holder in holders)
            elif holders:
                sender = int(cluster.members[home][stripe % len(cluster.members[home])])
                receiver = int(members[stripe % len(members)])
                if sender != owner:
                    stages[0].add(Message(owner, sender, expert, stripe))
                stages[1].add(Message(sender, receiver, expert, stripe))
                stages[2].update(Message(receiver, holder, expert, stripe) for holder in holders if holder != receiver)


class Transfer:
    """The rank's side of one plan's route for experts of ``size`` elements each."""

    def __init__(self, plan: PlacementPlan, route: Route, size: int, peers: Peers) -> None:
        self.plan, self.route, self.size, self.peers = plan, route, size, peers
        self.widths = route.cut(size)
        owned = plan.owned(peers.rank)
        self.rows = np.flatnonzero(plan.copies[owned].any(axis=1)).tolist()
        """Which of this rank's owned experts travel, as rows of their stacked parameters."""
        self.sent = owned[self.rows].tolist()
        self.copied = plan.copied(peers.rank).tolist()

    def gather(self, rows: Tensor) -> PendingGather:
        """Start SparseAllGather. rows: [travelling experts, size], kept unchanged until the result is there."""
        return PendingGather(self, rows)

    def reduce(self, gradients: Tensor) -> PendingReduce:
        """Start SparseReduceScatter. gradients: [copied experts, size]."""
        return PendingReduce(self, gradients)

    def start(self, stage: Sequence[Message], pieces: dict[Piece, Tensor], like: Tensor, *, back: bool) -> tuple[Work, list[Message]]:
        """Post one stage: the messages forwards, or backwards from destination to source. Returns the work and the
        messages of which a piece arrives here, in the order of the received elements."""
        rank, ranks = self.peers.rank, self.peers.size
        sending = [m for m in stage if (m.destination if back else m.source) == rank]
        arriving = [m for m in stage if (m.source if back else m.destination) == rank]
        if back:
            sending.sort(key=lambda m: (m.source, m.piece))
            arriving.sort(key=lambda m: (m.destination, m.piece))
        send, receive = [0] * ranks, [0] * ranks
        for m in sending:
            send[m.source if back else m.destination] += self.widths[m.stripe]
        for m in arriving:
            receive[m.destination if back else m.source] += self.widths[m.stripe]
        flat = torch.cat([pieces[m.piece] for m in sending]) if sending else like.new_empty(0)
        kind = "sparse_reduce_scatter" if back else "sparse_all_gather"
        count_traffic(kind, [n * like.element_size() for n in send], self.peers, messages=len(sending))
        return start_all_to_all(flat, send, receive, self.peers, kind), arriving


class PendingGather:
    """A SparseAllGather under way; later stages of its route start when :meth:`wait` finds the earlier ones done."""

    def __init__(self, transfer: Transfer, rows: Tensor) -> None:
        self.transfer = transfer
        self.pieces: dict[Piece, Tensor] = {}
        for expert, row in zip(transfer.sent, rows, strict=True):
            self.pieces.update({(expert, i): part for i, part in enumerate(row.split(transfer.widths))})
        self.like = rows
        self.current = transfer.start(transfer.route.stages[0], self.pieces, rows, back=False)

    def wait(self) -> Tensor:
        """[copied experts, size], in the order of ``PlacementPlan.copied``."""
        transfer, stages = self.transfer, self.transfer.route.stages
        for following in (*stages[1:], None):
            work, arriving = self.current
            flat = work.wait()
            if len(stages) == 1 and transfer.route.stripes == 1:
                return flat.view(-1, transfer.size)  # it has arrived in that order
            for message, part in zip(arriving, flat.split([transfer.widths[m.stripe] for m in arriving]), strict=True):
                self.pieces[message.piece] = part
            if following is not None:
                self.current = transfer.start(following, self.pieces, self.like, back=False)
        wanted = [self.pieces[expert, stripe] for expert in transfer.copied for stripe in range(transfer.route.stripes)]
        return torch.cat(wanted).view(-1, transfer.size) if wanted else self.like.new_empty(0, transfer.size)


class PendingReduce:
    """A SparseReduceScatter under way.

    Sums have at least float32 and a fixed order: at each rank of a piece's tree its own part first, then what arrives by
    rank. Partial sums travel in that dtype too; a copy's own gradient travels in the dtype that it was computed in.
    """

    def __init__(self, transfer: Transfer, gradients: Tensor) -> None:
        self.transfer = transfer
        staged = len(transfer.route.stages) > 1
        self.sum_dtype = torch.promote_types(gradients.dtype, torch.float32)
        wire = gradients.to(self.sum_dtype) if staged else gradients
        self.like = wire
        self.pieces: dict[Piece, Tensor] = {}
        for expert, row in zip(transfer.copied, wire, strict=True):
            self.pieces.update({(expert, i): part for i, part in enumerate(row.split(transfer.widths))})
        self.current = transfer.start(transfer.route.stages[-1], self.pieces, wire, back=True)
        if not staged:
            self.pieces.clear()  # they are on their way; in stages they may have to be added to what arrives

    def wait(self) -> dict[int, Tensor]:
        """Owned expert id -> [size] sum of its copies' gradients, for those that have copies."""
        transfer = self.transfer
        for following in (*reversed(transfer.route.stages[:-1]), None):
            work, arriving = self.current
            parts = work.wait().split([transfer.widths[m.stripe] for m in arriving])
            for message, part in zip(arriving, parts, strict=True):
                held = self.pieces.get(message.piece)
                self.pieces[message.piece] = part.to(self.sum_dtype) if held is None else held + part
            if following is not None:
                self.current = transfer.start(following, self.pieces, self.like, back=True)
        owned = set(transfer.sent)
        stripes: dict[int, list[Tensor]] = defaultdict(list)
        for (expert, _), part in sorted((item for item in self.pieces.items() if item[0][0] in owned), key=lambda item: item[0]):
            stripes[expert].append(part)
        return {expert: torch.cat(parts) for expert, parts in stripes.items()}


def sparse_all_gather(rows: Tensor, plan: PlacementPlan, cluster: Cluster, peers: Peers, transport: Transport = "direct") -> Tensor:
    """rows: [owned experts, size] of this rank -> [copied experts, size]. Collective over the peers."""
    transfer = Transfer(plan, Route.of(plan, cluster, transport), rows.shape[1], peers)
    return transfer.gather(rows[transfer.rows]).wait()


def sparse_reduce_scatter(
    gradients: Tensor, plan: PlacementPlan, cluster: Cluster, peers: Peers, transport: Transport = "direct"
) -> dict[int, Tensor]:
    """gradients: [copied experts, size] of this rank -> for each owned expert with copies their sum [size]."""
    return Transfer(plan, Route.of(plan, cluster, transport), gradients.shape[1], peers).reduce(gradients).wait()


def new_peers(ranks: Sequence[int], node_of: Sequence[int], timeout: float) -> Peers:
    """A communicator of its own over these global ranks. Collective over the default group."""
    from datetime import timedelta

    group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout))
    return Peers(group, tuple(node_of))
