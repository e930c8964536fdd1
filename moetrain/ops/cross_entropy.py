"""Cross-entropy of a linear layer's outputs, without the logits of all tokens in memory.

Tokens are taken in chunks; each chunk's logits are turned into its gradient at once, in the forward pass, and dropped. So the
layer costs its three matrix products; computing the logits again in the backward would make it four. The price is that the
gradient must be known up to one factor: the op returns one differentiable sum, whose gradient includes the z-loss.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.ops.product import product

SMALLEST_CHUNK = 256
"""Tokens below which a matrix product would read the weights too often."""


class OutputPart(Protocol):
    """The outputs of one rank where several ranks share them.

    first: number of the rank's first output. largest: most outputs of any rank.
    """

    first: int
    largest: int

    def combine(self, log_partition: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Log-partition and target logit (0 if it is elsewhere) of each token [T] over this part -> over all outputs."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks."""
        ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore: int,
    z_weight: float = 0.0,
    part: OutputPart | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(nll, z): sums over the targets other than ``ignore`` of -log softmax(W h)[target] and of z_weight * logsumexp(W h)^2.

    hidden: [T, D]. weight: [V, D], computed with in the dtype of hidden. targets: [T] int64. Logits and sums are at least
    float32. nll carries the gradient of nll + z, and z none: both must enter the loss with the same factor.
    part: what ``weight`` is of all outputs; the gradient of hidden is then the rank's part of the sum over ranks.
    chunk: tokens at a time; default: as many as make the logits as large as hidden, at least 256.
    """
    if chunk is None:
        chunk = max(SMALLEST_CHUNK, hidden.numel() // max(1, weight.shape[0] if part is None else part.largest))
    return _LinearCrossEntropy.apply(hidden, weight, targets, ignore, z_weight, part, chunk, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore: int,
        z_weight: float,
        part: OutputPart | None,
        chunk: int,
        grad: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        rows = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if grad and ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(rows, dtype=wide) if grad and ctx.needs_input_grad[1] else None
        nll, z = (hidden.new_zeros((), dtype=wide) for _ in range(2))  # no views: FSDP warns of them
        for start in range(0, hidden.shape[0], chunk):
            x, target = hidden[start : start + chunk], targets[start : start + chunk]
            counts = target != ignore
            index = target if part is None else target - part.first
            # another id than this part's is another rank's; without parts gather refuses it
            here = counts if part is None else (index >= 0) & (index < rows.shape[0]) & counts
            index = torch.where(here, index, 0)[:, None]

            logits = (x @ rows.t()).to(wide)
            chosen = torch.where(here, logits.gather(1, index)[:, 0], 0.0)
            top = logits.amax(dim=1)
            logits.sub_(top[:, None]).exp_()
            log_partition = top + logits.sum(dim=1).log()
            if part is not None:
                log_partition, chosen = part.combine(log_partition, chosen)
            nll += torch.where(counts, log_partition - chosen, 0.0).sum()
            z += z_weight * torch.where(counts, log_partition.square(), 0.0).sum()
            if grad_hidden is None and grad_weight is None:
                continue

            slope = torch.where(counts, 1 + 2 * z_weight * log_partition, 0.0)
            logits.mul_((slope * (top - log_partition).exp())[:, None])  # slope * softmax
            logits.scatter_add_(1, index, -here.to(wide)[:, None])
            slopes = logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(slopes, rows, out=grad_hidden[start : start + chunk])
            if grad_weight is not None:
                product(slopes.t(), x, out=grad_weight, add=True)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.part, ctx.weight_dtype = part, weight.dtype
        ctx.mark_non_differentiable(z)
        return nll, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        if ctx.part is not None:
            grad = ctx.part.sum(grad)
        grad_hidden = None if grad_hidden is None else grad_hidden * grad
        grad_weight = None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None
