"""What all routers share: a linear layer in at least float32, initial values, and the two step hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from moetrain.moe.context import LayerStatistics, RouterContext
from moetrain.moe.routing import Routing

Initialiser = Callable[[Tensor, torch.Generator], None]
"""Fills a tensor in place."""


def at_least_float32(x: Tensor) -> Tensor:
    """Scores, softmax and losses are float32, or float64 when the model is: never a half-precision type."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Router(nn.Module):
    """Maps tokens [T, D] to a :class:`Routing`. Discrete choices go through ``ctx.once``.

    num_experts: E, the experts that hold parameters.
    initial: parameters and buffers with a start of their own, a constant or an initialiser. The model initialises the
        other parameters; other buffers start at zero.
    frozen: True while the optimizer leaves the parameters alone.
    causal: False if a token's experts depend on later tokens in evaluation too, so that a decoder cannot generate with them.
    tied: names of submodules that all routers of a model share.
    """

    initial: Mapping[str, float | Initialiser] = {}
    tied: tuple[str, ...] = ()
    num_experts: int
    frozen: bool = False
    causal: bool = True

    def forward(self, x: Tensor, ctx: RouterContext) -> Routing:
        raise NotImplementedError

    def begin_step(self, step: int, total_steps: int) -> None:
        """Set scheduled values before the forward passes of an optimizer step."""

    def end_step(self, statistics: LayerStatistics) -> None:
        """Update selection state from the statistics of the whole step (all ranks, valid training tokens only).
        Called after the optimizer step, and only if that was not skipped."""


class LinearRouter(Router):
    """A router whose logits are ``x W^T (+ b)``, W [E', D]. trained: False for random weights that stay as they are; they
    are buffers, so that no optimizer knows them."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        num_columns: int | None = None,
        bias: bool = False,
        trained: bool = True,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.num_columns = num_columns or num_experts
        weight = torch.empty(self.num_columns, hidden_size, dtype=dtype)
        offset = torch.empty(self.num_columns, dtype=dtype) if bias else None
        if trained:
            self.weight = nn.Parameter(weight)
            self.bias = None if offset is None else nn.Parameter(offset)
        else:
            self.register_buffer("weight", weight)
            self.register_buffer("bias", offset)
            self.initial = dict.fromkeys(("weight", "bias"), uniform(1 / math.sqrt(hidden_size)))

    def logits(self, x: Tensor) -> Tensor:
        """[T, E'] in at least float32."""
        x = at_least_float32(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


def tie_routers(routers: Iterable[Router]) -> nn.ModuleDict:
    """Give routers the first one's submodules where they share them; returns those by name."""
    tied = nn.ModuleDict()
    for router in routers:
        for name in router.tied:
            if name not in tied:
                tied[name] = getattr(router, name)
            setattr(router, name, tied[name])
    return tied


def uniform(bound: float) -> Initialiser:
    """Fills with numbers from U(-bound, bound)."""
    return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)  # type: ignore[return-value]
