"""A routing decision: a sparse T x E matrix (tokens x experts) with one weight per entry.

Every router returns one :class:`Routing`; capacity policies map it to another; losses, dispatch, metrics
and reports read nothing else. Letters: T tokens, E experts of the family, K choices per token, N entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moetrain.ops.count import count

PAD = -1
"""Expert id of an entry that is not there: a choice of a padding token, or one that capacity has dropped."""


@dataclass(frozen=True)
class Routing:
    """Entries in coordinate form; a fixed-k routing additionally has a cheap [T, K] view.

    token:      [N] int64, row of the token in the layer's input.
    expert:     [N] int64, expert id, or PAD. Ids >= num_experts are zero-computation kinds.
    slot:       [N] int64, which of its token's choices an entry is (0 = first); capacity priority.
    weight:     [N] float32 or float64 combine weight, with gradient.
    num_tokens: T.   num_experts: E, the experts that hold parameters.
    logits, probs: [T, E'] with gradient, or None. ``probs`` rows sum to one (sigmoid and other scores are
        normalised), E' = number of columns that the router scores.
    selected:   [E'] int64 entries per expert before any drop, detached.
    dispatched: [E'] int64 entries per expert after capacity, detached.
    top_k:      K if entry t * K + k is choice k of token t for all t and k, else None.
    padded:     True if PAD entries may be present (reading it costs no device synchronisation).
    aux:        named extras that some losses need; a loss names what it requires.
    """

    token: Tensor
    expert: Tensor
    slot: Tensor
    weight: Tensor
    num_tokens: int
    num_experts: int
    selected: Tensor
    dispatched: Tensor
    logits: Tensor | None = None
    probs: Tensor | None = None
    top_k: int | None = None
    padded: bool = False
    aux: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def expert_TK(self) -> Tensor:
        """Expert ids as [T, K]; only for fixed-k routings."""
        assert self.top_k is not None, "a ragged routing has no [T, K] view"
        return self.expert.view(self.num_tokens, self.top_k)

    @property
    def weight_TK(self) -> Tensor:
        """Weights as [T, K]; only for fixed-k routings."""
        assert self.top_k is not None, "a ragged routing has no [T, K] view"
        return self.weight.view(self.num_tokens, self.top_k)

    def keep(self, kept: Tensor, weight: Tensor | None = None) -> Routing:
        """This routing after capacity: entries where ``kept`` [N] bool is False become PAD with weight 0.

        weight: [N] replacement of the weights, e.g. renormalised over what was kept.
        """
        expert = torch.where(kept, self.expert, PAD)
        weight = torch.where(kept, self.weight if weight is None else weight, 0.0)
        return replace(self, expert=expert, weight=weight, padded=True, dispatched=count_experts(expert, self.selected.numel()))

    def narrow(self, first: int, num_tokens: int) -> Routing:
        """The routing of the ``num_tokens`` tokens from ``first`` on, numbered from 0. ``selected`` stays that of all tokens."""
        rows = slice(first, first + num_tokens)
        entries: slice | Tensor = (self.token >= first) & (self.token < first + num_tokens)
        if self.top_k is not None:
            entries = slice(first * self.top_k, (first + num_tokens) * self.top_k)
        expert = self.expert[entries]
        return replace(
            self,
            token=self.token[entries] - first,
            expert=expert,
            slot=self.slot[entries],
            weight=self.weight[entries],
            num_tokens=num_tokens,
            dispatched=count_experts(expert, self.selected.numel()),
            logits=None if self.logits is None else self.logits[rows],
            probs=None if self.probs is None else self.probs[rows],
            aux={},
        )


def count_experts(expert: Tensor, num_experts: int) -> Tensor:
    """Entries per expert, [num_experts] int64; PAD entries are not counted. expert: [N] int64."""
    return count(expert, num_experts)


def fixed_routing(
    expert_TK: Tensor,
    weight_TK: Tensor,
    *,
    num_experts: int,
    logits: Tensor | None = None,
    probs: Tensor | None = None,
    valid: Tensor | None = None,
    num_columns: int | None = None,
    aux: Mapping[str, Tensor] | None = None,
) -> Routing:
    """A routing in which every token has K choices, in the order of preference.

    expert_TK: [T, K] int64. weight_TK: [T, K]. valid: [T] bool, tokens that take part (None: all);
    the choices of the others become PAD. num_columns: experts including zero-computation kinds.
    """
    tokens, top_k = expert_TK.shape
    if valid is not None:
        expert_TK = torch.where(valid[:, None], expert_TK, PAD)
        weight_TK = torch.where(valid[:, None], weight_TK, 0.0)
    device = expert_TK.device
    expert = expert_TK.reshape(-1)
    counts = count_experts(expert, num_columns or num_experts)
    return Routing(
        token=torch.arange(tokens, device=device).repeat_interleave(top_k),
        expert=expert,
        slot=torch.arange(top_k, device=device).repeat(tokens),
        weight=weight_TK.reshape(-1),
        num_tokens=tokens,
        num_experts=num_experts,
        selected=counts,
        dispatched=counts,
        logits=logits,
        probs=probs,
        top_k=top_k,
        padded=valid is not None,
        aux=aux or {},
    )


def ragged_routing(
    selected_TE: Tensor,
    weight_TE: Tensor,
    *,
    num_experts: int,
    logits: Tensor | None = None,
    probs: Tensor | None = None,
    valid: Tensor | None = None,
    aux: Mapping[str, Tensor] | None = None,
) -> Routing:
    """A routing in which each token has any number of experts, also none.

    selected_TE: [T, E] bool. weight_TE: [T, E], read where selected. Slots number a token's choices by
    falling weight (ties: lower expert id first).
    """
    if valid is not None:
        selected_TE = selected_TE & valid[:, None]
    token, expert = selected_TE.nonzero(as_tuple=True)
    weight = weight_TE[token, expert]
    rank = torch.where(selected_TE, -weight_TE.detach(), torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    counts = count_experts(expert, selected_TE.shape[1])
    return Routing(
        token=token,
        expert=expert,
        slot=rank[token, expert],
        weight=weight,
        num_tokens=selected_TE.shape[0],
        num_experts=num_experts,
        selected=counts,
        dispatched=counts,
        logits=logits,
        probs=probs,
        aux=aux or {},
    )
