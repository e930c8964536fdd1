"""The MoE layer: router -> dropout -> capacity -> executor -> experts, plus a shared expert beside them.

It names no method: what differs between papers is in its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from moetrain.moe.capacity import Capacity
from moetrain.moe.context import LayerStatistics, RouterContext
from moetrain.moe.dropout import RouteDropout
from moetrain.moe.execution import Executor, LocalExecutor
from moetrain.moe.experts import Experts, ZeroExperts
from moetrain.moe.losses import Loss
from moetrain.moe.mixers import Mixer, Residual, ResidualConfig
from moetrain.moe.routers import Router
from moetrain.moe.routing import Routing


class MoELayer(nn.Module):
    """x [B, S, D] or [T, D] -> y of the same shape. Statistics and weighted losses go to the forward context.

    zero_experts: what the ids from num_experts on contribute, or None if they contribute nothing. shared: an FFN that sees
    every token, or None. dropout: by name, applied in this order. mixer: how y enters the residual stream, for the block
    around this layer. executor: replaced by ``parallel.parallelize``.
    """

    def __init__(
        self,
        *,
        router: Router,
        capacity: Capacity,
        experts: Experts,
        losses: Mapping[str, Loss],
        dropout: Mapping[str, RouteDropout] | None = None,
        zero_experts: ZeroExperts | None = None,
        shared: nn.Module | None = None,
        mixer: Mixer | None = None,
    ) -> None:
        super().__init__()
        self.router = router
        self.capacity = capacity
        self.experts = experts
        self.losses = nn.ModuleDict(losses)
        self.dropout = dict(dropout or {})
        self.zero_experts = zero_experts
        self.shared = shared
        self.mixer = mixer or Residual()
        self.executor: Executor = LocalExecutor()

    def forward(self, x: Tensor, ctx: RouterContext) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        with record_function("moe.router"):
            routing = executed = self.router(tokens, ctx)
        with record_function("moe.capacity"):
            for name, dropout in self.dropout.items():
                executed = dropout(executed, ctx, name)
            executed = self.capacity(executed, ctx)
        with record_function("moe.losses"):
            self.record(routing, executed, ctx)
        with record_function("moe.execute"):
            y = self.executor(tokens, executed, self.experts, ctx)
        if self.zero_experts is not None:
            y = y + self.zero_experts(tokens, executed)
        y = y.view(-1, *x.shape[1:])  # an executor may return fewer tokens: a rank's run of them
        if self.shared is None:
            return y
        with record_function("moe.shared"):
            return y + self.shared(x)

    def prefetch(self, ctx: RouterContext) -> None:
        """To be called before the mixer in front of this layer: lets weights travel under it."""
        self.executor.prefetch(self.experts, ctx)

    def record(self, routing: Routing, executed: Routing, ctx: RouterContext) -> None:
        """Statistics and, in training, the auxiliary losses; a recomputed pass adds neither a second time.

        It does evaluate the losses again: activation checkpointing needs both passes to save the same tensors.
        """
        if not ctx.forward.recomputing:
            ctx.forward.statistics[ctx.name] = statistics(executed, ctx)
        if ctx.training:
            for name, loss in self.losses.items():
                assert isinstance(loss, Loss)
                ctx.forward.add_loss(name, loss.coefficient * ctx.share(loss.scope) * loss(routing, ctx))


@torch.no_grad()
def statistics(routing: Routing, ctx: RouterContext) -> LayerStatistics:
    """Sums over the valid tokens of this pass at one layer."""
    entropy = torch.zeros((), dtype=routing.weight.dtype, device=routing.weight.device)
    if routing.probs is not None:
        per_token = torch.special.entr(routing.probs).sum(dim=1)
        entropy = (per_token if ctx.valid is None else torch.where(ctx.valid, per_token, 0.0)).sum()
    tokens = ctx.forward.valid_tokens(routing.expert.device)
    own = routing.aux.get("step_sums", torch.zeros(0, dtype=torch.float64, device=routing.expert.device))
    return LayerStatistics(routing.selected, routing.dispatched, entropy, tokens, own)


@dataclass(kw_only=True)
class MoEParts:
    """Configurations of the replaceable parts, from which a model builds the MoE layers it wants.

    one_expert: the experts have not been spawned yet (``experts.spawn``).
    """

    router: Any
    experts: Any
    capacity: Any
    loss: Mapping[str, Any] = field(default_factory=dict)
    dropout: Mapping[str, Any] = field(default_factory=dict)
    mixer: Any = field(default_factory=ResidualConfig)
    one_expert: bool = False

    def build(self, hidden_size: int, *, dtype: torch.dtype, shared: nn.Module | None = None) -> MoELayer:
        """One MoE layer for inputs of ``hidden_size`` features."""
        zero_experts = getattr(self.router, "zero_experts", None)
        return MoELayer(
            router=self.router.build(hidden_size, self.experts.num_experts, dtype=dtype),
            capacity=self.capacity.build(),
            experts=self.experts.build(hidden_size, dtype=dtype),
            losses={name: config.build() for name, config in self.loss.items()},
            dropout={name: config.build() for name, config in self.dropout.items()},
            zero_experts=None if zero_experts is None else zero_experts.build(hidden_size, dtype=dtype),
            shared=shared,
            mixer=self.mixer.build(),
        )
