"""Chunked schedule of one MoE layer: how many chunks to cut its tokens into, and the time that takes.

FSMoE (2501.10714 section 4): the tokens of a layer pass in r chunks through AlltoAll, AllGather, experts,
ReduceScatter and AlltoAll back, on three streams at once (between nodes, within a node, compute). Each task takes
alpha + beta * n / r per chunk. Instead of the paper's choice among four cases, which is exact only if AllGather and
ReduceScatter take about the same time, :func:`makespan` is the exact length of the schedule for any costs.

Seconds throughout; work n in the unit that beta is per (bytes, FLOPs).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

TASKS = ("all_to_all", "all_gather", "reduce_scatter", "experts")
"""Order of the last axis of all costs. Dispatch and combine are one AlltoAll each, with the same cost."""

MAX_DEGREE = 16


@dataclass(frozen=True)
class ChunkCosts:
    """Linear cost models and work of the four tasks of one or of several layers.

    alpha: [..., 4] start-up seconds. beta: [..., 4] seconds per unit of work. n: [..., 4] work of all chunks together.
    The order is that of TASKS; leading axes are layers.
    """

    alpha: Floats
    beta: Floats
    n: Floats

    def chunk(self, r: ArrayLike) -> Floats:
        """[..., 4] seconds of each task for one of r chunks (2501.10714 eq. 1). r: broadcast with the leading axes."""
        return self.alpha + self.beta * self.n / np.asarray(r, dtype=np.float64)[..., None]

    def backward(self) -> ChunkCosts:
        """The backward pass: the same bytes, twice the products (gradients of inputs and of weights)."""
        factor = np.where(np.arange(len(TASKS)) == TASKS.index("experts"), 2.0, 1.0)
        return replace(self, alpha=self.alpha * factor, n=self.n * factor)


def makespan(costs: ChunkCosts, r: ArrayLike, gar: ArrayLike = 0.0) -> Floats:
    """Exact seconds [...] of the schedule with r chunks.

    Streams work in fixed order: between nodes D_1..D_r, gar, C_1..C_r; within a node AG_1..AG_r, RS_1..RS_r; compute
    E_1..E_r; chunk i goes D_i -> AG_i -> E_i -> RS_i -> C_i. The length is that of the longest path through these
    precedences: a path stays on one stream for r tasks, or changes from stream to stream at a chunk.

    r: positive integers. gar: seconds of a gradient AllReduce on the inter-node stream after the last dispatch.
    """
    a, g, s, e = _by_task(costs, r)
    r, gar = np.asarray(r), np.asarray(gar)
    paths = (
        2 * r * a + gar,
        2 * a + g + s + r * e,
        2 * r * a + g + s,
        2 * a + r * g + r * s,
        (r + 1) * a + g + r * s,
        (r + 1) * a + r * g + s,
        (r + 1) * a + g + e + s,
        2 * a + r * g + e + s,
        2 * a + g + e + r * s,
    )
    return np.max(np.stack(np.broadcast_arrays(*paths)), axis=0)


def case_times(costs: ChunkCosts, r: ArrayLike, gar: ArrayLike = 0.0) -> Floats:
    """[..., 4] the paper's formulas for its four cases (2501.10714 section 4.3), all lower bounds of the makespan:
    bound by the inter-node stream, by compute, by AlltoAll, by the intra-node stream."""
    a, g, s, e = _by_task(costs, r)
    r, gar = np.asarray(r), np.asarray(gar)
    cases = (2 * r * a + gar, 2 * a + g + s + r * e, 2 * r * a + g + s, 2 * a + r * g + r * s)
    return np.stack(np.broadcast_arrays(*cases), axis=-1)


def best_degree(costs: ChunkCosts, max_degree: int = MAX_DEGREE, gar: ArrayLike = 0.0) -> NDArray[np.int64]:
    """[...] the number of chunks in 1..max_degree with the least makespan; of equal ones the smallest."""
    degrees = np.arange(1, max_degree + 1)
    times = [makespan(costs, r, gar) for r in degrees]
    return np.argmin(np.stack(times, axis=-1), axis=-1) + 1


def idle_window(costs: ChunkCosts, r: ArrayLike) -> Floats:
    """[...] seconds for which the inter-node stream waits: a gradient AllReduce of at most this length is free."""
    return makespan(costs, r) - 2 * np.asarray(r) * _by_task(costs, r)[0]


def _by_task(costs: ChunkCosts, r: ArrayLike) -> Floats:
    return np.moveaxis(costs.chunk(r), -1, 0)
