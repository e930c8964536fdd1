"""The collectives that layouts are made of, differentiable where needed, with counters of what they move.

Every autograd function here runs its communication on all ranks whatever the number of rows, also zero: a
collective that one rank leaves out deadlocks the others or pairs up with a wrong one.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

traffic: Counter[str] = Counter()
"""Bytes that left this rank (the part for itself excluded), by kind of collective, since the last clear()."""


def all_to_all_rows(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Uneven all-to-all of rows. x: [sum(send), ...], rows for rank 0 first; returns [sum(receive), ...].

    The gradient travels the other way.
    """
    return _AllToAllRows.apply(x, send, receive, group)


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.splits, ctx.group = (send, receive), group
        return _exchange(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        send, receive = ctx.splits
        return _exchange(grad, receive, send, ctx.group), None, None, None


def _exchange(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    row_bytes = x[:1].numel() * x.element_size()
    traffic["all_to_all"] += row_bytes * (sum(send) - send[group.rank()])
    return out


def gather_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' integer vectors: [n] -> [ranks, n]."""
    out = counts.new_empty(group.size() * counts.numel())
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.13
    gather(out, counts.contiguous(), group=group)
    return out.view(group.size(), -1)


def sum_over(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks of a group; the gradient is summed over them as well."""
    return _SumOver.apply(tensor, group)


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class GroupReducer:
    """:class:`moetrain.moe.context.Reducer` over a process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def sum(self, tensor: Tensor) -> Tensor:
        return sum_over(tensor, self.group)
