"""Residual rules that read the MoE layers of a model as descent steps (MomentumSMoE, 2410.14574).

x <- x + f(x) is plain descent along f; momentum, Adam and robust momentum replace it. Their state starts at zero in each
forward pass, and only MoE layers read or change it: attention and dense blocks between them move x alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from moetrain.config import Component, setting
from moetrain.errors import Problem
from moetrain.moe.context import RouterContext
from moetrain.moe.mixers.base import Mixer
from moetrain.moe.routers.base import at_least_float32
from moetrain.registry import register

ADAM_EPSILON = 1e-8
"""Added to the second moment inside the root, as the released code does."""


@register("mixer", "momentum", source="MomentumSMoE 2410.14574")
@dataclass(kw_only=True)
class MomentumConfig(Component):
    """Heavy ball: m <- mu m + gamma f(x), x <- x + m. A pre-norm model sums steps of up to gamma / (1 - mu)."""

    mu: float = setting(0.7, doc="share of the previous MoE layer's step that is repeated; 0: plain residual", ge=0, lt=1)
    gamma: float = setting(1.0, doc="step size", gt=0)
    subtract: bool = setting(False, doc="x - m as the released code: the same functions, with experts that learn -f")

    def build(self) -> Momentum:
        return Momentum(self)


class Momentum(Mixer):
    """Carries m [like x] in at least float32."""

    def __init__(self, config: MomentumConfig) -> None:
        super().__init__()
        self.config = config
        self.sign = -1 if config.subtract else 1

    def forward(self, x: Tensor, y: Tensor, ctx: RouterContext) -> Tensor:
        return (x + self.sign * self.push(at_least_float32(y), ctx)).to(x.dtype)

    def push(self, f: Tensor, ctx: RouterContext) -> Tensor:
        """The new m."""
        m = self.config.gamma * f
        if "momentum" in ctx.carry:
            m = self.config.mu * ctx.carry["momentum"] + m
        ctx.carry["momentum"] = m
        return m


@register("mixer", "adam", source="MomentumSMoE 2410.14574 (AdamSMoE)")
@dataclass(kw_only=True)
class AdamConfig(MomentumConfig):
    """Adam's step in the first MoE layers, the momentum rule in the others; m is updated in all of them.

    p <- beta1 p + (1 - beta1) f, v <- beta2 v + (1 - beta2) f^2, x <- (1 - decay) x + step p / sqrt(v + 1e-8), without
    bias correction: the first step is about 3.2 step sign(f).
    """

    step: float = setting(1.0, doc="step size of Adam's rule; released scripts 0.8 to 1", gt=0)
    beta1: float = setting(0.9, doc="decay of the first moment", ge=0, lt=1)
    beta2: float = setting(0.999, doc="decay of the second moment", ge=0, lt=1)
    layers: int = setting(1, doc="first MoE layers that take Adam's step", ge=1)
    decay: float = setting(0.0, doc="share of x that Adam's step drops; 1 in the released code, where the residual cancels", ge=0, le=1)

    def build(self) -> Adam:
        return Adam(self)


class Adam(Momentum):
    """Carries p and v beside m, and the number of MoE layers so far."""

    config: AdamConfig

    def forward(self, x: Tensor, y: Tensor, ctx: RouterContext) -> Tensor:
        config, f = self.config, at_least_float32(y)
        m = self.push(f, ctx)
        number, p, v = ctx.carry.get("adam", (0, None, None))
        if number >= config.layers:
            return (x + self.sign * m).to(x.dtype)
        p, v = (1 - config.beta1) * f + scaled(config.beta1, p), (1 - config.beta2) * f.square() + scaled(config.beta2, v)
        ctx.carry["adam"] = (number + 1, p, v)
        return ((1 - config.decay) * x + self.sign * config.step * p / (v + ADAM_EPSILON).sqrt()).to(x.dtype)


def scaled(factor: float, state: Tensor | None) -> Tensor | float:
    """factor * state; nothing at the start."""
    return 0.0 if state is None else factor * state


@register("mixer", "robust_momentum", source="MomentumSMoE 2410.14574; coefficients of Cyrus et al., American Control Conference 2018")
@dataclass(kw_only=True)
class RobustMomentumConfig(Component):
    """Robust momentum: y = x + gamma d, x' = x + beta d + alpha f(y), d <- x' - x, with three coefficients from one rate p.

    p = 1 - 1/kappa is descent with step 1/L at the points y, p = 1 - 1/sqrt(kappa) the triple momentum method.
    """

    kappa: float = setting(4.0, doc="condition number", gt=1)
    smoothness: float = setting(1.0, doc="L, inverse of the step size", gt=0)
    rate: float = setting(0.6, doc="p, between 1 - 1/sqrt(kappa) (fast) and 1 - 1/kappa (robust)", gt=0, lt=1)

    def problems(self, path: str) -> Iterable[Problem]:
        low, high = 1 - self.kappa**-0.5, 1 - 1 / self.kappa
        if not low <= self.rate <= high:
            yield Problem(f"{path}.rate", self.rate, f"must be between 1 - 1/sqrt(kappa) and 1 - 1/kappa ({low:.4g} and {high:.4g})")

    def coefficients(self) -> tuple[float, float, float]:
        """alpha, beta, gamma."""
        kappa, p = self.kappa, self.rate
        alpha = kappa * (1 - p) ** 2 * (1 + p) / self.smoothness
        return alpha, kappa * p**3 / (kappa - 1), p**3 / ((kappa - 1) * (1 - p) ** 2 * (1 + p))

    def build(self) -> RobustMomentum:
        return RobustMomentum(self)


class RobustMomentum(Mixer):
    """Carries d, the step that the last MoE layer took, in at least float32."""

    def __init__(self, config: RobustMomentumConfig) -> None:
        super().__init__()
        self.alpha, self.beta, self.gamma = config.coefficients()

    def look_ahead(self, x: Tensor, ctx: RouterContext) -> Tensor:
        return (x + scaled(self.gamma, ctx.carry.get("step"))).to(x.dtype)

    def forward(self, x: Tensor, y: Tensor, ctx: RouterContext) -> Tensor:
        step = self.alpha * at_least_float32(y) + scaled(self.beta, ctx.carry.get("step"))
        ctx.carry["step"] = step
        return (x + step).to(x.dtype)
