"""Executing a routing when each expert has one owner among the ranks of a group: tokens travel to their experts.

Dispatch, expert computation and combine follow DESIGN's order: one all-gather of counts, from which every rank
derives all splits; two uneven all-to-alls. Experts may be spread over the ranks in any way, also with ranks that
own none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.execution import add_identity_experts, sort_entries
from moetrain.moe.experts import Experts
from moetrain.moe.routing import Routing
from moetrain.ops.permute import combine_rows, gather_rows
from moetrain.parallel.collectives import all_to_all_rows, gather_counts
from moetrain.parallel.placement.planners import even_sharding


class OwnersExecutor:
    """owned: per rank of the group, the global ids of the experts that it owns, in the order of its parameters' rows."""

    def __init__(self, owned: Sequence[Sequence[int]], group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.sizes = [len(ids) for ids in owned]
        order = [expert for ids in owned for expert in ids]
        # position[expert]: its place when experts are listed rank by rank
        self.position = torch.tensor(order, device=device).argsort()

    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        rank = self.group.rank()
        order = sort_entries(routing, self.position)
        counts = gather_counts(order.counts, self.group)  # [source rank, place]
        # the one host copy of this layer: all splits follow from these integers
        per_rank = torch.stack([part.sum(1) for part in counts.split(self.sizes, dim=1)], dim=1).tolist()
        send, receive = per_rank[rank], [row[rank] for row in per_rank]
        mine = counts.split(self.sizes, dim=1)[rank]

        rows = gather_rows(x, order.token, order.place_TK)
        received = all_to_all_rows(rows, send, receive, self.group)
        by_expert, by_source = regroup(mine)
        y = experts.compute(gather_rows(received, by_expert, by_source[:, None]), mine.sum(0), experts.weights())
        y = all_to_all_rows(gather_rows(y, by_source, by_expert[:, None]), receive, send, self.group)
        y = combine_rows(y, order.weight, order.token, routing.num_tokens, order.place_TK)
        return add_identity_experts(y, x, routing).to(x.dtype)


def regroup(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Permutations between rows that arrive ordered by (source, expert) and rows ordered by (expert, source).

    counts: [sources, experts] int64. Returns by_expert and its inverse by_source, both [counts.sum()] int64:
    x[by_expert] is ordered by expert, and y[by_source] brings it back.
    """
    sources, experts = counts.shape
    expert = torch.arange(experts, device=counts.device).repeat(sources).repeat_interleave(counts.reshape(-1))
    by_expert = expert.argsort(stable=True)
    by_source = torch.empty_like(by_expert)
    by_source[by_expert] = torch.arange(by_expert.numel(), device=counts.device)
    return by_expert, by_source


def even_owners(num_experts: int, ranks: int) -> list[list[int]]:
    """``even_sharding`` rank by rank; ranks beyond the number of experts own none."""
    owner = even_sharding(num_experts, ranks)
    return [(owner == rank).nonzero()[0].tolist() for rank in range(ranks)]
