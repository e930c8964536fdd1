"""Memory of a rank, by formula: parameters, gradients, AdamW's moments and copies of experts. Activations are not in it.

Letters: L MoE layers, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moetrain.parallel.placement.cost import LayerCost
from moetrain.parallel.placement.plan import Integers
from moetrain.simulate.model import ModelSizes

STATE = 4
"""Values that an owner keeps per parameter: itself, its gradient and two moments."""

BLOCKS_GATHERED = 2
"""Blocks whose dense parameters FSDP2 holds whole: the one that computes, and the next one, which arrives."""

PASSES_IN_FLIGHT = 2
"""Layers of which gradients of copies, and with re-materialisation copies, exist at the same time: one computes, one sends
or receives."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the fullest rank."""

    owned_experts: int
    copies: int
    dense: int

    @property
    def total(self) -> int:
        return self.owned_experts + self.copies + self.dense


def dense_bytes(sizes: ModelSizes, ranks: int) -> int:
    """Everything but experts under FSDP2: a rank's share of the state; and, with several ranks, parameters and gradients
    of the root, which stays gathered from forward to backward, and parameters of the gathered blocks with one's gradients."""
    parameters = sizes.root + sum(sizes.blocks)
    share = -(-parameters // ranks) * STATE
    gathered = 2 * sizes.root + (BLOCKS_GATHERED + 1) * max(sizes.blocks)
    return sizes.parameter_bytes * (share + (gathered if ranks > 1 else 0))


def copy_bytes(copies: Integers, costs: Sequence[LayerCost]) -> Integers:
    """[R] bytes of copies and their gradients, given the number of copies [L, R].

    Copies stay from forward to backward in all layers, unless they are re-materialised.
    """
    weights = copies * np.array([cost.expert_bytes for cost in costs])[:, None]
    gradients = copies * np.array([cost.gradient_bytes for cost in costs])[:, None]

    def largest(parts: Integers) -> Integers:
        return np.sort(parts, axis=0)[-PASSES_IN_FLIGHT:].sum(axis=0)

    if costs[0].rematerialize:
        return largest(weights + gradients)
    return weights.sum(axis=0) + largest(gradients)


def rank_memory(sizes: ModelSizes, owned: Integers, copies: Integers, costs: Sequence[LayerCost]) -> RankMemory:
    """Memory of the fullest rank. owned, copies: [L, R] experts that each rank owns, and copies that it holds."""
    state = STATE * sizes.parameter_bytes * np.array(sizes.expert_parameters)[:, None]
    of_owned, of_copies = (owned * state).sum(axis=0), copy_bytes(copies, costs)
    fullest = int((of_owned + of_copies).argmax())
    return RankMemory(int(of_owned[fullest]), int(of_copies[fullest]), dense_bytes(sizes, owned.shape[1]))
