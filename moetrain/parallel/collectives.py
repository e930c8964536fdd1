"""The collectives that layouts are made of, differentiable where needed, with counters of what they move.

Every autograd function here runs its communication on all ranks whatever the number of rows, also zero: a
collective that one rank leaves out deadlocks the others or pairs up with a wrong one.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from moetrain.errors import CommunicationError


@dataclass
class Traffic:
    """What has left this rank since the last :meth:`clear`, and the time that it waited.

    bytes, messages: by (kind of collective, tier of link); tier is "intra" or "inter" (between nodes), and the part
    of a collective that a rank sends to itself is not counted. waited: seconds in waits, by kind.
    """

    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    messages: Counter[tuple[str, str]] = field(default_factory=Counter)
    waited: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def clear(self) -> None:
        self.bytes.clear()
        self.messages.clear()
        self.waited.clear()

    def by_name(self) -> dict[str, int]:
        """Bytes as ``{"dispatch.inter": ...}``."""
        return {f"{kind}.{tier}": count for (kind, tier), count in sorted(self.bytes.items())}


traffic = Traffic()


@dataclass(frozen=True)
class Peers:
    """A process group and the node of each of its ranks."""

    group: dist.ProcessGroup
    node_of: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def tier(self, rank: int) -> str:
        """The kind of link from this rank to another."""
        return "intra" if self.node_of[rank] == self.node_of[self.rank] else "inter"


def count_traffic(kind: str, send: Sequence[int], peers: Peers, messages: int | None = None) -> None:
    """Record bytes sent to each rank. messages: how many, by default one per rank that gets any."""
    for rank, size in enumerate(send):
        if size and rank != peers.rank:
            traffic.bytes[kind, peers.tier(rank)] += size
            if messages is None:
                traffic.messages[kind, peers.tier(rank)] += 1
    if messages:
        traffic.messages[kind, "all"] += messages


@contextmanager
def naming(operation: str, peers: Peers) -> Iterator[None]:
    """Failures of the group's backend (a lost rank, a time-out) become errors that name this rank and the operation; in a trace
    it is a range of that name."""
    try:
        with record_function(f"comm.{operation}"):
            yield
    except RuntimeError as error:
        raise CommunicationError(
            f"rank {dist.get_rank()}: {operation} among {peers.size} ranks failed: another rank is lost, or slower than "
            f"launch.timeout_seconds ({str(error).splitlines()[0]})"
        ) from error


class Work:
    """A collective under way and the tensor that it fills."""

    def __init__(self, work: dist.Work, out: Tensor, kept: Tensor, peers: Peers, kind: str) -> None:
        # the input must not be freed or changed before the end
        self.work, self.out, self.kept, self.peers, self.kind = work, out, kept, peers, kind

    def wait(self) -> Tensor:
        """The filled tensor."""
        started = time.perf_counter()
        with naming(self.kind, self.peers):
            self.work.wait()
        traffic.waited[self.kind] += time.perf_counter() - started
        return self.out


def start_all_to_all(x: Tensor, send: list[int], receive: list[int], peers: Peers, kind: str) -> Work:
    """Uneven all-to-all of rows (or elements) under way. x: [sum(send), ...], contiguous."""
    out = x.new_empty(sum(receive), *x.shape[1:])
    with naming(kind, peers):
        work = dist.all_to_all_single(out, x, receive, send, group=peers.group, async_op=True)
    return Work(work, out, x, peers, kind)


class Exchange:
    """One uneven all-to-all of rows and, in the backward pass, its mirror image.

    Between :meth:`start` and :meth:`finish` other work can run; in the backward pass between the two likewise, in
    mirrored order.
    """

    def __init__(self, send: list[int], receive: list[int], peers: Peers, kind: str) -> None:
        self.send, self.receive, self.peers, self.kind = send, receive, peers, kind
        self.work: Work | None = None

    def start(self, x: Tensor) -> Tensor:
        """x: [sum(send), ...], rows for rank 0 first. Returns what :meth:`finish` takes; it holds nothing yet."""
        return _Start.apply(x, self)

    def finish(self, started: Tensor) -> Tensor:
        """[sum(receive), ...]"""
        return _Finish.apply(started, self)

    def post(self, x: Tensor, *, back: bool) -> Tensor:
        send, receive = (self.receive, self.send) if back else (self.send, self.receive)
        row = x[:1].numel() * x.element_size() if x.shape[0] else 0
        count_traffic(self.kind, [n * row for n in send], self.peers)
        self.work = start_all_to_all(x.contiguous(), send, receive, self.peers, self.kind)
        return self.work.out

    def wait(self) -> Tensor:
        assert self.work is not None
        work, self.work = self.work, None
        return work.wait()


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:  # type: ignore[override]
        ctx.exchange = exchange
        return exchange.post(x, back=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.exchange.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, started: Tensor, exchange: Exchange) -> Tensor:  # type: ignore[override]
        ctx.exchange = exchange
        return exchange.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.exchange.post(grad, back=True)
        return grad, None  # autograd wants a tensor of this shape; what _Start passes on is what the exchange brings


def all_to_all_rows(x: Tensor, send: list[int], receive: list[int], peers: Peers, kind: str = "all_to_all") -> Tensor:
    """Uneven all-to-all of rows. x: [sum(send), ...], rows for rank 0 first; returns [sum(receive), ...].

    The gradient travels the other way.
    """
    exchange = Exchange(send, receive, peers, kind)
    return exchange.finish(exchange.start(x))


def gather_counts(counts: Tensor, peers: Peers) -> Tensor:
    """All ranks' integer vectors: [n] -> [ranks, n]."""
    out = counts.new_empty(peers.size * counts.numel())
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.13
    started = time.perf_counter()
    with naming("all-gather of counts", peers):
        gather(out, counts.contiguous(), group=peers.group)
    traffic.waited["counts"] += time.perf_counter() - started
    return out.view(peers.size, -1)


def sum_over(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks of a group; the gradient is summed over them as well."""
    return _SumOver.apply(tensor, group)


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)  # NCCL refuses any other
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
