"""What all routers share: a linear layer in at least float32, initial values, and the two step hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moetrain.config import Component, setting
from moetrain.errors import Problem
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
    training_part: shares of training between which the parameters are trained. frozen: True outside, where the optimizer
        leaves all of them alone, those of shared submodules included: routers of a model have the same settings.
    fixed: names of the parameters that :meth:`fix` has made buffers.
    causal: False if a token's experts depend on later tokens in evaluation too, so that a decoder cannot generate with them.
    tied: names of submodules that all routers of a model share.
    """

    initial: Mapping[str, float | Initialiser] = {}
    tied: tuple[str, ...] = ()
    num_experts: int
    training_part: tuple[float, float] = (0.0, 1.0)
    frozen: bool = False
    fixed: frozenset[str] = frozenset()
    causal: bool = True

    def forward(self, x: Tensor, ctx: RouterContext) -> Routing:
        raise NotImplementedError

    def begin_step(self, step: int, total_steps: int) -> None:
        """Set scheduled values before the forward passes of an optimizer step. Subclasses that override it call it too."""
        start, end = self.training_part
        self.frozen = not start * total_steps <= step < end * total_steps

    def fix(self) -> None:
        """Make all parameters, those of submodules included, buffers: no optimizer knows them, they keep their random start."""
        self.fixed = frozenset(name for name, _ in self.named_parameters())
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())

    def end_step(self, statistics: LayerStatistics) -> None:
        """Update selection state from the statistics of the whole step (all ranks, valid training tokens only; on the host).
        Called after the optimizer step, and only if that was not skipped."""


@dataclass(kw_only=True)
class LearnedRouterConfig(Component):
    """Settings of all routers that have parameters."""

    trained: bool = setting(True, doc="false: random weights that stay as they are (SMoE-Dropout)")
    trained_from: float = setting(
        0.0,
        doc="part of training after which the router is trained; frozen before",
        ge=0,
        lt=1,
        schedule="counterpart of trained_until",
    )
    trained_until: float = setting(
        1.0,
        doc="part of training after which the router is frozen",
        gt=0,
        le=1,
        schedule="StableMoE 2204.08396 (second stage)",
    )

    def problems(self, path: str) -> Iterable[Problem]:
        if self.trained_from >= self.trained_until:
            yield Problem(f"{path}.trained_from", self.trained_from, f"must be < {path}.trained_until ({self.trained_until})")
        if not self.trained and (self.trained_from > 0 or self.trained_until < 1):
            yield Problem(f"{path}.trained", False, f"needs {path}.trained_from=0 and {path}.trained_until=1: it is never trained")

    def build(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> Router:
        """The router, frozen if it is not to be trained."""
        router = self.make(hidden_size, num_experts, dtype=dtype)
        router.training_part = self.trained_from, self.trained_until
        if not self.trained:
            router.fix()
        return router

    def make(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> Router:
        """The router with its parameters."""
        raise NotImplementedError


class LinearRouter(Router):
    """A router whose logits are ``x W^T (+ b)``, W [E', D]."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        num_columns: int | None = None,
        bias: bool = False,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.num_columns = num_columns or num_experts
        self.weight = nn.Parameter(torch.empty(self.num_columns, hidden_size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.num_columns, dtype=dtype)) if bias else None

    def fix(self) -> None:
        """W and b start as SMoE-Dropout's (2303.01610), from U(-1/sqrt(D), 1/sqrt(D))."""
        super().fix()
        self.initial = {**self.initial, **dict.fromkeys(("weight", "bias"), uniform(1 / math.sqrt(self.weight.shape[1])))}

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
