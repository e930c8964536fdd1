"""Dispatch in two hops: a token with several experts on one node crosses to that node once.

The idea is DeepEP's. A source sends each token once to a relay on every node that computes one of its experts; the relay
passes it on inside the node, gets the results back, and returns their weighted sum. Between nodes, rows per token and
node replace rows per token and expert, both ways and in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moetrain.ops.count import count
from moetrain.ops.permute import Rows, combine_rows, gather_rows
from moetrain.parallel.collectives import Peers, all_to_all_rows, gather_counts
from moetrain.parallel.indices import on_device, ranges, repeated
from moetrain.parallel.placement.plan import Cluster, Integers


@dataclass(frozen=True)
class Hop:
    """Rows sent to and received from each rank."""

    send: list[int]
    receive: list[int]


@dataclass(frozen=True)
class NodePlan:
    """This rank's indices for one execution.

    sent: what it sends, a row per (node, token), by token. rows, entries, inside: hops of tokens to relays, of one number
    per entry to relays, and of rows inside the node. order: [m] int64, entries that arrive at this relay in the order in
    which they go on; passed: these entries by the arrived row that each needs. arriving: [sources, slots] rows that this
    rank gets inside its node, by original source.
    """

    sent: Rows
    rows: Hop
    entries: Hop
    inside: Hop
    order: Tensor
    passed: Rows
    arriving: Integers


def relay(cluster: Cluster, source: int, node: int) -> int:
    """The rank of a node that takes what a source sends there: the one in the source's place, the source itself at home."""
    members = cluster.members[node]
    return int(members[cluster.place[source] % members.size])


def plan_nodes(token: Tensor, rows: Integers, slots: Integers, num_tokens: int, cluster: Cluster, peers: Peers) -> NodePlan:
    """From the entries of this rank in sending order to its part in both hops. Collective.

    token: [n] int64 source row of each entry, ordered by destination rank. rows: [R, E, R] rows that each rank has for
    each expert on each rank. slots: experts that this rank computes, in order.
    """
    device, rank, ranks = token.device, peers.rank, peers.size
    node_rows = rows.sum(axis=1)  # [R, R] entries from rank to rank
    node = repeated(on_device(cluster.node, device), node_rows[rank])
    unique, inverse = torch.unique(node * num_tokens + token, return_inverse=True)
    counts = gather_counts(count(unique // num_tokens, cluster.num_nodes), peers)
    tokens_to_node = counts.cpu().numpy()  # [R, N] the second host copy of a layer, only with two hops
    first = np.cumsum(tokens_to_node[rank]) - tokens_to_node[rank]
    local = inverse - on_device(first, device)[node]

    relays = np.array([[relay(cluster, s, v) for v in range(cluster.num_nodes)] for s in range(ranks)])  # [R, N]
    entries_to_node = node_rows @ cluster.membership.T  # [R, N]
    row_hop = _hop(tokens_to_node, relays, rank)
    entry_hop = _hop(entries_to_node, relays, rank)
    home = int(cluster.node[rank])
    sources = np.flatnonzero(relays[:, home] == rank)
    row = all_to_all_rows(local, entry_hop.send, entry_hop.receive, peers, "dispatch_index")
    offsets = np.cumsum(tokens_to_node[sources, home]) - tokens_to_node[sources, home]
    row = row + repeated(on_device(offsets, device), entries_to_node[sources, home])

    members = cluster.members[home]
    blocks = node_rows[np.ix_(sources, members)]  # [sources of this relay, ranks of the node], in this order on arrival
    starts = (np.cumsum(blocks) - blocks.ravel()).reshape(blocks.shape)
    order = ranges(starts.T.ravel(), blocks.T.ravel(), device)
    served = [np.flatnonzero(relays[:, home] == member) for member in members]
    send, receive = np.zeros(ranks, dtype=np.int64), np.zeros(ranks, dtype=np.int64)
    send[members] = blocks.sum(axis=0)
    receive[members] = [node_rows[ids, rank].sum() for ids in served]
    arriving = rows[np.concatenate(served)][:, slots, rank]
    return NodePlan(
        sent=Rows.of(unique % num_tokens, num_tokens),
        rows=row_hop,
        entries=entry_hop,
        inside=Hop(send.tolist(), receive.tolist()),
        order=order,
        passed=Rows.of(row[order], sum(row_hop.receive)),
        arriving=arriving,
    )


def _hop(to_node: Integers, relays: Integers, rank: int) -> Hop:
    """From [R, N] how much each rank sends to each node: to and from which relays."""
    send = np.zeros(len(relays), dtype=np.int64)
    np.add.at(send, relays[rank], to_node[rank])
    return Hop(send.tolist(), (to_node * (relays == rank)).sum(axis=1).tolist())


def through_nodes(x: Tensor, weight: Tensor, plan: NodePlan, peers: Peers, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Weighted sum over each token's entries, [T, D].

    weight: [n] of this rank's entries in sending order. compute: the experts on rows as they arrive, in that order.
    """
    arrived = all_to_all_rows(gather_rows(x, plan.sent), plan.rows.send, plan.rows.receive, peers, "dispatch")
    weights = all_to_all_rows(weight[:, None], plan.entries.send, plan.entries.receive, peers, "dispatch_weight")
    forwarded = all_to_all_rows(gather_rows(arrived, plan.passed), plan.inside.send, plan.inside.receive, peers, "dispatch_in_node")
    y = all_to_all_rows(compute(forwarded), plan.inside.receive, plan.inside.send, peers, "combine_in_node")
    y = combine_rows(y, weights[plan.order, 0], plan.passed)
    return combine_rows(all_to_all_rows(y, plan.rows.receive, plan.rows.send, peers, "combine"), None, plan.sent)
