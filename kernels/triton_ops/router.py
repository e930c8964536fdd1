"""Softmax over experts, the K best, their weights, and the statistics of the balance losses, in one pass over the logits.

Everything is float32. Ties go to the lower id; the choice is by logits, which softmax's rounding cannot tie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetrain.kernels.triton_ops.tiles import INTERPRETED

ENTRIES = 64 if INTERPRETED else 1024
"""Logits per program, so that tokens per program follow from the number of experts."""


@dataclass(frozen=True)
class Routed:
    """What the router's forward returns."""

    probs: Tensor
    """[T, E] float32: softmax of the logits."""
    index: Tensor
    """[T, K] int64: the experts of the K largest logits, best first."""
    weight: Tensor
    """[T, K] float32: their probabilities, divided by their sum if renormalised."""
    prob_sum: Tensor
    """[E] float32: the sum of the probabilities over all tokens."""
    count: Tensor
    """[E] int64: how often each expert was chosen."""
    logsumexp: Tensor
    """[T] float32: log of the sum of exp(logits), for the z-loss."""


def forward(logits: Tensor, top_k: int, *, renormalise: bool) -> Routed:
    """logits: [T, E], floating; 1 <= top_k <= E. Sums over tokens have a fixed order."""
    logits = logits.contiguous()
    num_tokens, num_experts = logits.shape
    assert 1 <= top_k <= num_experts, f"top_k={top_k} of {num_experts} experts"
    probs = torch.empty_like(logits, dtype=torch.float32)
    index = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    weight, logsumexp = probs.new_empty(num_tokens, top_k), probs.new_empty(num_tokens)
    experts, tokens = _block(num_experts)
    blocks = triton.cdiv(num_tokens, tokens)
    prob_sums = probs.new_empty(blocks, num_experts)
    counts = torch.empty(blocks, num_experts, dtype=torch.int32, device=logits.device)
    if num_tokens:
        _forward[(blocks,)](
            logits, probs, index, weight, logsumexp, prob_sums, counts, num_tokens, num_experts,
            TOP_K=top_k, RENORMALISE=renormalise, TOKENS=tokens, SLOTS=triton.next_power_of_2(top_k), EXPERTS=experts,
            num_warps=1 if INTERPRETED else 4,
        )  # fmt: skip
    return Routed(probs, index, weight, prob_sums.sum(0), counts.sum(0), logsumexp)


def backward(
    routed: Routed,
    *,
    renormalise: bool,
    grad_probs: Tensor | None = None,
    grad_weight: Tensor | None = None,
    grad_prob_sum: Tensor | None = None,
    grad_logsumexp: Tensor | None = None,
) -> Tensor:
    """The gradient of the logits [T, E] float32 from those of the results that have one (None: zero)."""
    (num_tokens, num_experts), top_k = routed.probs.shape, routed.index.shape[1]
    grad = torch.empty_like(routed.probs)
    experts, tokens = _block(num_experts)
    given = [None if g is None else g.contiguous() for g in (grad_probs, grad_weight, grad_prob_sum, grad_logsumexp)]
    if num_tokens:
        _backward[(triton.cdiv(num_tokens, tokens),)](
            routed.probs, routed.index, routed.weight, *given, grad, num_tokens, num_experts,
            TOP_K=top_k, RENORMALISE=renormalise, OF_PROBS=given[0] is not None, OF_WEIGHT=given[1] is not None,
            OF_PROB_SUM=given[2] is not None, OF_LOGSUMEXP=given[3] is not None, TOKENS=tokens, EXPERTS=experts,
            num_warps=1 if INTERPRETED else 4,
        )  # fmt: skip
    return grad


def _block(num_experts: int) -> tuple[int, int]:
    """Experts, padded to a power of two, and tokens of one program."""
    experts = triton.next_power_of_2(num_experts)
    return experts, max(ENTRIES // experts, 1)


@triton.jit
def _forward(
    logits: tl.tensor,
    probs: tl.tensor,
    index: tl.tensor,
    weight: tl.tensor,
    logsumexp: tl.tensor,
    prob_sums: tl.tensor,
    counts: tl.tensor,
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    token = block * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    valid = token < num_tokens
    inside = valid[:, None] & (expert[None, :] < num_experts)
    cell = token[:, None].to(tl.int64) * num_experts + expert[None, :]
    z = tl.load(logits + cell, mask=inside, other=float("-inf")).to(tl.float32)
    largest = tl.where(valid, tl.max(z, 1), 0.0)
    exponential = tl.exp(z - largest[:, None])
    total = tl.where(valid, tl.sum(exponential, 1), 1.0)
    p = exponential / total[:, None]
    tl.store(probs + cell, p, mask=inside)
    tl.store(logsumexp + token, largest + tl.log(total), mask=valid)
    tl.store(prob_sums + block.to(tl.int64) * num_experts + expert, tl.sum(p, 0), mask=expert < num_experts)

    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros([TOKENS, SLOTS], tl.int32)
    kept = tl.zeros([TOKENS, SLOTS], tl.float32)
    free = tl.broadcast_to(expert[None, :] < num_experts, [TOKENS, EXPERTS])
    for k in tl.static_range(TOP_K):
        best = tl.max(tl.where(free, z, float("-inf")), 1)
        is_best = free & (z == best[:, None])
        first = tl.min(tl.where(is_best, expert[None, :], num_experts - 1), 1)  # NaN still gives some expert
        here = expert[None, :] == first[:, None]
        chosen = tl.where(slot[None, :] == k, first[:, None], chosen)
        kept = tl.where(slot[None, :] == k, tl.sum(tl.where(here, p, 0.0), 1)[:, None], kept)
        free = free & (~here)
    taken = inside & (~free)
    tl.store(counts + block.to(tl.int64) * num_experts + expert, tl.sum(taken.to(tl.int32), 0), mask=expert < num_experts)
    if RENORMALISE:
        kept /= tl.where(valid, tl.sum(kept, 1), 1.0)[:, None]
    place = token[:, None].to(tl.int64) * TOP_K + slot[None, :]
    stored = valid[:, None] & (slot[None, :] < TOP_K)
    tl.store(index + place, chosen.to(tl.int64), mask=stored)
    tl.store(weight + place, kept, mask=stored)


@triton.jit
def _backward(
    probs: tl.tensor,
    index: tl.tensor,
    weight: tl.tensor,
    grad_probs: tl.tensor,
    grad_weight: tl.tensor,
    grad_prob_sum: tl.tensor,
    grad_logsumexp: tl.tensor,
    grad: tl.tensor,
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    OF_PROBS: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
    OF_PROB_SUM: tl.constexpr,
    OF_LOGSUMEXP: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> None:
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    valid = token < num_tokens
    inside = valid[:, None] & (expert[None, :] < num_experts)
    cell = token[:, None].to(tl.int64) * num_experts + expert[None, :]
    p = tl.load(probs + cell, mask=inside, other=0.0)
    of_p = tl.zeros([TOKENS, EXPERTS], tl.float32)
    if OF_PROBS:
        of_p += tl.load(grad_probs + cell, mask=inside, other=0.0)
    if OF_PROB_SUM:
        of_p += tl.load(grad_prob_sum + expert, mask=expert < num_experts, other=0.0)[None, :]
    if OF_WEIGHT:
        slot_offset = token.to(tl.int64) * TOP_K
        mean = tl.zeros([TOKENS], tl.float32)
        kept = tl.zeros([TOKENS], tl.float32)
        if RENORMALISE:  # w_k = p_k / sum: of_p_k = (of_w_k - sum over j of of_w_j w_j) / sum
            for k in tl.static_range(TOP_K):
                own = tl.load(weight + slot_offset + k, mask=valid, other=0.0)
                mean += own * tl.load(grad_weight + slot_offset + k, mask=valid, other=0.0)
                chosen = tl.load(index + slot_offset + k, mask=valid, other=0).to(tl.int32)
                kept += tl.sum(tl.where(expert[None, :] == chosen[:, None], p, 0.0), 1)
        for k in tl.static_range(TOP_K):
            of_w = tl.load(grad_weight + slot_offset + k, mask=valid, other=0.0)
            if RENORMALISE:
                of_w = (of_w - mean) / tl.where(valid, kept, 1.0)
            chosen = tl.load(index + slot_offset + k, mask=valid, other=0).to(tl.int32)
            of_p += tl.where(expert[None, :] == chosen[:, None], of_w[:, None], 0.0)
    of_z = p * (of_p - tl.sum(p * of_p, 1)[:, None])
    if OF_LOGSUMEXP:
        of_z += p * tl.load(grad_logsumexp + token, mask=valid, other=0.0)[:, None]
    tl.store(grad + cell, of_z, mask=inside)
