"""COMET (2306.02824): k trees of smooth-step splits select experts; a permutation of each tree's leaves is learned early.

As the entropy of the splits falls each tree ends at one leaf, and a token has at most k experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.config import setting
from moetrain.moe.context import RouterContext
from moetrain.moe.routers.base import LearnedRouterConfig, Router, at_least_float32, uniform
from moetrain.moe.routing import Routing, ragged_routing
from moetrain.ops.assignment import best_permutation, sinkhorn
from moetrain.ops.smooth_step import smooth_step
from moetrain.registry import register

EPSILON = 1e-6
"""Added inside the logarithm of entropies, as the released code does."""

LEAF_BOUND = 0.05
"""Leaf weights and permutation scores start uniform within it."""

TEMPERATURES, ITERATIONS = (1e-3, 1e-7), (20, 150)
"""Of the Sinkhorn normalisation at the start and the end of the search: the one falls geometrically, the other rises linearly."""


@register("router", "comet", source="COMET 2306.02824")
@dataclass(kw_only=True)
class CometRouterConfig(LearnedRouterConfig):
    """Trees of differentiable splits over the experts; all experts with a non-zero gate take part, few once it is trained.

    The defaults are those of COMET-BERT but for its shifted entropy. The TensorFlow version: split_bias, unreached=0,
    log_epsilon=1e-8.
    """

    num_trees: int = setting(doc="k, trees; experts per token at the end", ge=1, follows="model.top_k")
    width: float = setting(1.0, doc="gamma, width of the band in which a split is soft; COMET-BERT's script 0.1", gt=0)
    split_bias: bool = setting(False, doc="learned bias of each split")
    unreached: float = setting(1e-5, doc="leaves of at most this probability get no weight", ge=0, lt=1)
    log_epsilon: float = setting(1e-6, doc="added to a leaf's probability inside its logarithm", ge=0)
    shifted_entropy: bool = setting(
        False, doc="entropy of max(P, 1e-6) + 1e-6 as COMET-BERT's code, not 0 when decided; false: -P log(P + 1e-6)"
    )
    permutation_steps: int = setting(
        0, doc="optimizer steps in which permutations of the leaves are learned (COMET+); 0: none", ge=0, schedule="COMET 2306.02824"
    )

    lacks: ClassVar = frozenset({"logits"})

    @property
    def provides(self) -> frozenset[str]:
        """Names that a routing has in ``aux`` in training."""
        return frozenset({"selector_entropy"} | ({"permutation_entropy"} if self.permutation_steps else set()))

    def make(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> CometRouter:
        return CometRouter(self, hidden_size, num_experts, dtype=dtype)


class CometRouter(Router):
    """See :class:`CometRouterConfig`.

    split_weight: [k, E - 1, D] and split_bias [k, E - 1], nodes as in a heap: the children of n are 2n + 1 and 2n + 2.
    leaf_weight: [k, E, D], leaf_bias: [k, E]. permutation: None without search.
    """

    def __init__(self, config: CometRouterConfig, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        trees, start = config.num_trees, config.width / 100  # splits start soft, if inputs are of order one
        self.split_weight = nn.Parameter(torch.empty(trees, num_experts - 1, hidden_size, dtype=dtype))
        self.split_bias = nn.Parameter(torch.empty(trees, num_experts - 1, dtype=dtype)) if config.split_bias else None
        self.leaf_weight = nn.Parameter(torch.empty(trees, num_experts, hidden_size, dtype=dtype))
        self.leaf_bias = nn.Parameter(torch.empty(trees, num_experts, dtype=dtype))
        steps = config.permutation_steps
        self.permutation = PermutationSearch(trees, num_experts, steps=steps, dtype=dtype) if steps else None
        self.initial = {
            "split_weight": uniform(start),
            "split_bias": uniform(start),
            "leaf_weight": uniform(LEAF_BOUND),
            "leaf_bias": 0.0,
            "permutation.scores": uniform(LEAF_BOUND),
        }

    def begin_step(self, step: int, total_steps: int) -> None:
        super().begin_step(step, total_steps)
        if self.permutation is not None:
            self.permutation.begin_step(step)

    def forward(self, x: Tensor, ctx: RouterContext) -> Routing:
        """x: [T, D] -> ragged Routing."""
        config, x = self.config, at_least_float32(x)
        splits = torch.einsum("td,knd->tkn", x, self.split_weight.to(x.dtype))
        if self.split_bias is not None:
            splits = splits + self.split_bias.to(x.dtype)
        reach = leaf_probabilities(smooth_step(splits, config.width))
        leaves = torch.einsum("td,ked->tke", x, self.leaf_weight.to(x.dtype)) + self.leaf_bias.to(x.dtype)
        scores = torch.where(reach > config.unreached, leaves + torch.log(reach + config.log_epsilon), -torch.inf)
        weight = torch.softmax(scores.flatten(1), dim=1).view_as(scores)
        aux = {}
        if ctx.training:
            undecided = torch.special.entr(reach.clamp_min(EPSILON) + EPSILON) if config.shifted_entropy else entropy(reach)
            aux["selector_entropy"] = undecided.sum(dim=(1, 2))
        if self.permutation is None:
            gates = weight.sum(dim=1)
        else:
            matrices = self.permutation(ctx)
            gates = torch.einsum("tke,kel->tl", weight, matrices.to(weight.dtype))
            if ctx.training:
                aux["permutation_entropy"] = permutation_entropy(matrices)
        gates = gates / gates.sum(dim=1, keepdim=True)
        selected = ctx.once("select", lambda: gates > 0)
        return ragged_routing(selected, gates, num_experts=self.num_experts, probs=gates, valid=ctx.valid, aux=aux)


def leaf_probabilities(left: Tensor) -> Tensor:
    """[T, k, E] probability of each leaf, from that of going left at each of the E - 1 nodes [T, k, E - 1].

    Nodes and then leaves are numbered level by level, as in a heap; leaves of the last but one level come first.
    """
    level = left.new_ones(*left.shape[:-1], 1)
    leaves = []
    while level.shape[-1]:
        turn = left[..., : level.shape[-1]]
        left = left[..., turn.shape[-1] :]
        reached, outer = level.tensor_split([turn.shape[-1]], dim=-1)
        leaves.append(outer)
        level = torch.stack([reached * turn, reached * (1 - turn)], dim=-1).flatten(-2)
    return torch.cat(leaves, dim=-1)


def entropy(p: Tensor) -> Tensor:
    """-p log(p + epsilon), elementwise."""
    return -p * torch.log(p + EPSILON)


def permutation_entropy(matrices: Tensor) -> Tensor:
    """Scalar: entropy of the entries [k, E, E], plus that of the rows normalised; mean over the trees. 0 for permutations,
    2 E log E at most."""
    rows = matrices / matrices.sum(dim=2, keepdim=True)
    return (entropy(matrices) + entropy(rows)).sum(dim=(1, 2)).mean()


class PermutationSearch(nn.Module):
    """Permutations [k, E, E] of leaves (rows) onto experts (columns): soft while they are learned, hard in evaluation and
    afterwards.

    scores: [k, E, E]. progress: buffer [], the share of the search that is behind us. fixed: buffer [k, E] int64, 1 + the
    expert of each leaf once the search is over, 0 before.
    """

    progress: Tensor
    fixed: Tensor

    def __init__(self, num_trees: int, num_experts: int, *, steps: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.steps = steps
        self.scores = nn.Parameter(torch.empty(num_trees, num_experts, num_experts, dtype=dtype))
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))
        self.register_buffer("fixed", torch.zeros(num_trees, num_experts, dtype=torch.int64))

    def begin_step(self, step: int) -> None:
        self.progress.fill_(min(1.0, step / self.steps))

    def forward(self, ctx: RouterContext) -> Tensor:
        """[k, E, E]; with gradient while it is learned."""
        progress = float(self.progress)
        if ctx.training and progress < 1:
            return self.soft(progress)
        return F.one_hot(self.hard(progress), self.scores.shape[2]).to(torch.promote_types(self.scores.dtype, torch.float32))

    def soft(self, progress: float) -> Tensor:
        """Doubly stochastic matrices, nearer to permutations as the search goes on."""
        start, end = TEMPERATURES
        first, last = ITERATIONS
        scores = at_least_float32(self.scores)
        return sinkhorn(scores / (start * (end / start) ** progress), round(first + (last - first) * progress))

    @torch.no_grad()
    def hard(self, progress: float) -> Tensor:
        """[k, E] int64: the best assignment to the soft matrices. Kept once the search is over: an optimizer goes on moving
        parameters without gradient."""
        if bool(self.fixed.any()):
            return self.fixed - 1
        found = torch.stack([best_permutation(matrix) for matrix in self.soft(progress)])
        if progress >= 1:
            self.fixed.copy_(found + 1)
        return found
