"""Loads of many steps: recorded by a run, or synthetic.

Letters: S steps, L MoE layers, R ranks, E experts. A row is one token at one of its experts.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.errors import ConfigError, Problem
from moetrain.parallel.placement.plan import Integers

SYNTHETIC = "uniform, one, zipf:<exponent> such as zipf:1.2"


@dataclass(frozen=True, eq=False)
class Trace:
    """counts: [S, L, R, E] int64, rows that each rank had for each expert. name: where they are from."""

    name: str
    layers: tuple[str, ...]
    counts: Integers

    @property
    def num_steps(self) -> int:
        return self.counts.shape[0]

    @property
    def num_ranks(self) -> int:
        return self.counts.shape[2]

    @property
    def num_experts(self) -> int:
        return self.counts.shape[3]

    def on(self, ranks: int, rows: int | None = None) -> Trace:
        """The same routing on another number of ranks, with ``rows`` rows on each; None: as many rows in all as before."""
        counts = self.counts if ranks == self.num_ranks else divide(self.counts, ranks)
        return replace(self, counts=counts if rows is None else scale(counts, rows))


def divide(counts: Integers, ranks: int) -> Integers:
    """[..., R, E] rows on R ranks -> [..., ranks, E]: per expert, rows lie in a line by rank, which is cut into equal parts.

    Ranks that differed go on to differ, and no row is lost. Cuts through a row fall now before, now after it, by expert.
    """
    old, experts = counts.shape[-2:]
    before = np.concatenate([np.zeros_like(counts[..., :1, :]), counts.cumsum(axis=-2)], axis=-2)
    whole, part = np.divmod(np.arange(ranks + 1) * old, ranks)
    cut = np.minimum(whole, old - 1)
    through = np.where(whole < old, part, ranks)[:, None] * counts[..., cut, :]
    ends = before[..., cut, :] + (through + np.arange(experts) % ranks) // ranks
    return np.diff(ends, axis=-2)


def scale(counts: Integers, rows: int) -> Integers:
    """[..., E] counts in the same proportions, ``rows`` in all (none where there were none), each off by less than one."""
    ends = counts.cumsum(axis=-1)
    total = np.maximum(ends[..., -1:], 1)
    return np.diff(ends * rows // total, axis=-1, prepend=0)


def read_trace(path: Path) -> Trace:
    """Read what ``moetrain train metrics.trace_routing=true`` writes to traces/loads.jsonl, plain or compressed (.gz).

    Raises ConfigError naming the line that is not as expected.
    """
    steps: list[Any] = []
    layers: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    for number, line in enumerate(_lines(path), start=1):
        try:
            loads = json.loads(line)["loads"]
            counts = np.array(list(loads.values()))
            valid = counts.ndim == 3 and counts.size > 0 and counts.dtype.kind == "i" and counts.min() >= 0
        except (ValueError, KeyError, TypeError, AttributeError):
            valid = False
        if not valid:
            raise _refusal(path, f'line {number} is not {{"step": ..., "loads": {{layer: rows by rank and expert}}}}')
        if steps and (tuple(loads), counts.shape) != (layers, shape):
            raise _refusal(path, f"line {number} has other layers, ranks or experts than the lines before")
        layers, shape = tuple(loads), counts.shape
        steps.append(counts)
    if not steps:
        raise _refusal(path, "holds no steps; a run writes them with metrics.trace_routing=true under a layout that places experts")
    return Trace(str(path), layers, np.array(steps, dtype=np.int64))


def _lines(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            yield from file
    except (OSError, EOFError, UnicodeDecodeError) as error:
        missing = f"no such file; a run writes one with metrics.trace_routing=true, or use {SYNTHETIC}"
        raise _refusal(path, missing if isinstance(error, FileNotFoundError) else f"cannot be read: {error}") from error


def _refusal(path: Path, why: str) -> ConfigError:
    return ConfigError([Problem("trace", str(path), why)])


def synthetic_trace(
    name: str, *, steps: int, layers: int, ranks: int, experts: int, tokens: int, top_k: int, seed: int = 0
) -> Trace | None:
    """A trace of independent choices by fixed popularities; None if ``name`` is not that of a synthetic trace.

    uniform: all experts alike. one: all tokens take the same ``top_k`` experts. zipf:s: the i-th most popular expert has a
    weight of i^-s, in another order in each layer; no expert gets more than one row of a token, on average. tokens: of a
    rank. Steps and ranks differ by sampling only, so errors of prediction are smaller than in training.
    """
    popularity = _popularity(name, experts, top_k)
    if popularity is None:
        return None
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(experts) for _ in range(layers)]
    counts = [[rng.multinomial(tokens * top_k, popularity[order], size=ranks) for order in orders] for _ in range(steps)]
    return Trace(name, tuple(f"layer {layer}" for layer in range(layers)), np.array(counts, dtype=np.int64))


def _popularity(name: str, experts: int, top_k: int) -> NDArray[np.float64] | None:
    kind, _, argument = name.partition(":")
    if name == "uniform":
        return np.full(experts, 1 / experts)
    if name == "one":
        return np.where(np.arange(experts) < top_k, 1 / top_k, 0.0)
    if kind != "zipf":
        return None
    try:
        exponent = float(argument)
    except ValueError:
        exponent = -1.0
    if not 0 <= exponent < np.inf:
        raise ConfigError([Problem("trace", name, "must be zipf:<exponent> with an exponent >= 0, such as zipf:1.2")])
    weights = np.arange(1.0, experts + 1) ** -exponent
    popularity, most = weights / weights.sum(), 1 / top_k
    while (popularity > most * (1 + 1e-9)).any():  # what exceeds the most that a token can take goes to the others
        full = popularity >= most
        popularity = np.where(full, most, weights * (1 - most * full.sum()) / weights[~full].sum())
    return popularity
