"""A pre-norm decoder language model made of residual blocks, and how its weights are initialised.

Families (``deepseek_moe``, ``glam``) choose the parts; nothing here or there knows about parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moetrain.errors import ConfigError, Problem
from moetrain.models.common.attention import AttentionInput, KeyValueCache, SoftmaxAttention
from moetrain.models.common.init import Init
from moetrain.models.common.layers import Linear
from moetrain.models.common.positions import rope_table
from moetrain.models.common.sharding import SPLITS, Split, local_part
from moetrain.models.common.vocabulary import Vocabulary, WholeVocabulary
from moetrain.moe.context import ForwardContext
from moetrain.moe.layer import MoELayer
from moetrain.moe.routers.base import tie_routers

Output = Callable[[Tensor, Tensor, Vocabulary], Any]
"""What to make of the final hidden states [T, D] and the rows [V, D] of the output matrix (under tensor parallelism this rank's
rows) in place of logits: a tensor or a tuple of tensors."""

NOT_CAUSAL = "is not causal: a token's experts depend on later tokens, which a decoder refuses unless router.allow_future=true"


class Block(nn.Module):
    """x + attention(norm(x)), then + channel(norm(x)). The channel block is a dense FFN or an MoE layer, whose mixer may
    replace the sum.

    recompute: activation checkpointing; routing decisions and carried state of the first pass are reused in the second.
    """

    def __init__(self, *, name: str, attn_norm: nn.Module, attn: SoftmaxAttention, ffn_norm: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.attn_norm, self.attn, self.ffn_norm, self.ffn = attn_norm, attn, ffn_norm, ffn
        self.recompute = False

    def forward(self, x: Tensor, shared: AttentionInput, ctx: ForwardContext) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return self.compute(x, shared, ctx)

        carry = dict(ctx.carry)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _recomputation(ctx, carry)

        # no draws from torch's generators happen inside: noise is counter-based
        return checkpoint(self.compute, x, shared, ctx, use_reentrant=False, context_fn=contexts, preserve_rng_state=False)

    def compute(self, x: Tensor, shared: AttentionInput, ctx: ForwardContext) -> Tensor:
        if not isinstance(self.ffn, MoELayer):
            x = x + self.attn(self.attn_norm(x), shared)
            return x + self.ffn(self.ffn_norm(x))
        layer, mixer = ctx.at(self.name), self.ffn.mixer
        self.ffn.prefetch(layer)
        x = x + self.attn(self.attn_norm(x), shared)
        return mixer(x, self.ffn(self.ffn_norm(mixer.look_ahead(x, layer)), layer), layer)


@contextmanager
def _recomputation(ctx: ForwardContext, carry: dict[str, Any]) -> Iterator[None]:
    """carry: as it was when the block was entered."""
    ctx.recomputing, ctx.carry, after = True, dict(carry), ctx.carry
    try:
        yield
    finally:
        ctx.recomputing, ctx.carry = False, after


class Decoder(nn.Module):
    """tokens [B, S] -> logits [B, S, V] in at least float32 (under tensor parallelism this rank's columns of them), or what
    ``output`` makes of the final hidden states.

    rope_theta: None without rotary embedding. logit_scale: factor on the final hidden states. head: None if the
    output is tied to the embedding. compute_dtype: dtype of activations. vocabulary: replaced by ``parallel.parallelize``.
    Raises ConfigError for a router that is not causal.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        blocks: list[Block],
        norm: nn.Module,
        head: Linear | None,
        head_dim: int,
        rope_theta: float | None,
        logit_scale: float,
        compute_dtype: torch.dtype,
        init: Mapping[str, Init],
        splits: Mapping[str, Split] = SPLITS,
    ) -> None:
        super().__init__()
        for block in blocks:
            if isinstance(block.ffn, MoELayer) and not block.ffn.router.causal:
                raise ConfigError([Problem("router", type(block.ffn.router).__name__, NOT_CAUSAL)])
        parameter_dtype = next(norm.parameters()).dtype
        self.embed = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=parameter_dtype))
        # before the layers, so that its parameters have their names from here
        self.tied = nn.ModuleDict({"router": tie_routers(block.ffn.router for block in blocks if isinstance(block.ffn, MoELayer))})
        """Modules that the layers share."""
        self.layers = nn.ModuleList(blocks)
        self.norm = norm
        self.head = head
        self.head_dim, self.rope_theta, self.logit_scale, self.compute_dtype = head_dim, rope_theta, logit_scale, compute_dtype
        self.init = init
        """Initialiser by parameter name pattern (``*`` matches anything); experts by their logical names."""
        self.splits = splits
        self.vocabulary: Vocabulary = WholeVocabulary()

    def forward(
        self,
        tokens: Tensor,
        ctx: ForwardContext,
        document: Tensor | None = None,
        cache: KeyValueCache | None = None,
        output: Output | None = None,
    ) -> Any:
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        rope = None if self.rope_theta is None else rope_table(positions, self.head_dim, self.rope_theta, dtype=self.compute_dtype)
        shared = AttentionInput(positions=positions, rope=rope, document=document, cache=cache)
        x = self.vocabulary.embed(tokens, local_part(self.embed)).to(self.compute_dtype)
        for block in self.layers:
            x = block(x, shared, ctx)
        if cache is not None:
            cache.length += tokens.shape[1]
        x = self.norm(x).view(*tokens.shape, -1)
        if self.logit_scale != 1.0:
            x = x * self.logit_scale
        weight = local_part(self.embed if self.head is None else self.head.weight)
        if output is not None:  # here, where FSDP has gathered the weight
            return output(x.flatten(0, 1), weight, self.vocabulary)
        logits = F.linear(x, weight.to(x.dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def moe_layers(self) -> dict[str, MoELayer]:
        """MoE layers by the name under which they record losses and statistics."""
        return {f"{block.name}.ffn": block.ffn for block in self.layers if isinstance(block.ffn, MoELayer)}  # type: ignore[union-attr,misc]
