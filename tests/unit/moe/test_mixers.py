"""Residual rules: closed forms, stability, precision, recomputation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.config import load
from moetrain.errors import ConfigError
from moetrain.moe.context import ForwardContext, RouterContext
from moetrain.moe.mixers import Mixer, Residual
from moetrain.moe.mixers.momentum import AdamConfig, MomentumConfig, RobustMomentumConfig
from moetrain.testing import assert_close
from moetrain.testing.layouts import train_steps
from moetrain.testing.scenarios import SCENARIOS, compare

T, D, LAYERS = 5, 4, 4


def context() -> RouterContext:
    return ForwardContext(batch_size=1, seq_len=T, training=True).at("layers.0")


def random(seed: int = 0) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers() -> list[Any]:
    matrices = [torch.randn(D, D, generator=torch.Generator().manual_seed(10 + i), dtype=torch.float64) for i in range(LAYERS)]
    return [lambda x, w=w: torch.tanh(x @ w) for w in matrices]


def unroll(mixer: Mixer, x: Tensor, functions: list[Any]) -> list[Tensor]:
    ctx, xs = context(), [x]
    for f in functions:
        xs.append(mixer(xs[-1], f(mixer.look_ahead(xs[-1], ctx)), ctx))
    return xs


def test_without_momentum_it_is_the_residual_sum() -> None:
    plain = unroll(Residual(), random(), layers())
    assert_close(torch.stack(unroll(MomentumConfig(mu=0.0).build(), random(), layers())), torch.stack(plain), "exact")


def test_two_layers_have_their_closed_form() -> None:
    mu, gamma = 0.7, 0.4
    x0, x1, x2 = unroll(MomentumConfig(mu=mu, gamma=gamma).build(), random(), layers()[:2])
    f0, f1 = layers()[0](x0), layers()[1](x1)
    assert_close(x2, x0 + gamma * ((1 + mu) * f0 + f1), "layout")


def test_subtracting_is_adding_for_experts_that_learn_the_negative() -> None:
    negative = [lambda x, f=f: -f(x) for f in layers()]
    added, subtracted = (unroll(MomentumConfig(subtract=s).build(), random(), f) for s, f in ((False, layers()), (True, negative)))
    assert_close(torch.stack(subtracted), torch.stack(added), "exact")


def test_at_the_robust_end_the_points_of_evaluation_descend_with_step_one_over_l() -> None:
    kappa, smoothness = 5.0, 2.0
    mixer = RobustMomentumConfig(kappa=kappa, smoothness=smoothness, rate=1 - 1 / kappa).build()
    ctx, x, points = context(), random(), []
    for f in layers():
        points.append(mixer.look_ahead(x, ctx))
        x = mixer(x, f(points[-1]), ctx)
    for f, before, after in zip(layers(), points, points[1:], strict=False):
        assert_close(after, before + f(before) / smoothness, "layout")


@pytest.mark.parametrize(("curvature", "plain", "momentum"), [(1.9, True, True), (2.5, False, True), (3.5, False, False)])
def test_momentum_is_stable_on_a_wider_range(curvature: float, plain: bool, momentum: bool) -> None:
    """On f = -s x plain descent needs gamma s < 2, heavy ball gamma s < 2 (1 + mu)."""
    f = [lambda x: -curvature * x] * 400
    for mixer, stable in ((Residual(), plain), (MomentumConfig(mu=0.7).build(), momentum)):
        assert bool(unroll(mixer, random(), f)[-1].norm() < random().norm()) == stable


def test_adam_steps_by_sign_first_and_by_momentum_later() -> None:
    config = AdamConfig(mu=0.7, gamma=0.4, step=0.5)
    (x0, x1, x2), f = unroll(config.build(), random(), layers()[:2]), layers()
    large, ratio = f[0](x0).abs() > 0.1, (1 - config.beta1) / (1 - config.beta2) ** 0.5
    assert bool(((x1 - x0) / (0.5 * ratio * f[0](x0).sign()))[large].sub(1).abs().max() < 1e-3) and 3.1 < ratio < 3.2
    assert_close(x2 - x1, 0.4 * (0.7 * f[0](x0) + f[1](x1)), "layout")
    dropped = unroll(AdamConfig(decay=1.0, step=0.5).build(), random(), f[:1])[1]
    assert_close(dropped, x1 - x0, "layout")


def test_adam_in_two_layers_keeps_its_moments() -> None:
    b1, b2 = 0.9, 0.999
    (_, x1, x2), f = unroll(AdamConfig(layers=2).build(), random(), layers()[:2]), layers()
    f0, f1 = f[0](random()), f[1](x1)
    p, v = b1 * (1 - b1) * f0 + (1 - b1) * f1, b2 * (1 - b2) * f0**2 + (1 - b2) * f1**2
    assert_close(x2 - x1, p / (v + 1e-8).sqrt(), "layout")


def test_state_of_half_precision_is_float32() -> None:
    ctx, mixer = context(), AdamConfig().build()
    x = mixer(random().bfloat16(), 1e-3 * random(1).bfloat16(), ctx)
    assert x.dtype == torch.bfloat16
    number, *moments = ctx.carry["adam"]
    assert number == 1 and all(state.dtype == torch.float32 for state in (*moments, ctx.carry["momentum"]))


def test_rates_outside_their_interval_are_refused() -> None:
    for rate in (0.4, 0.8):
        with pytest.raises(ConfigError, match=r"mixer\.rate = 0\.[48]: must be between .*0\.5 and 0\.75"):
            load(RobustMomentumConfig, {"kappa": 4.0, "rate": rate}, path="mixer")


@pytest.mark.parametrize("name", ["momentum", "adam", "robust_momentum"])
def test_recomputation_sees_the_state_of_the_first_pass(name: str) -> None:
    plain, recomputed = (train_steps(0, 1, replace(SCENARIOS[name], recompute=r), "single") for r in (False, True))
    compare(recomputed, plain)
    assert plain.losses != train_steps(0, 1, SCENARIOS["deepseek"], "single").losses
