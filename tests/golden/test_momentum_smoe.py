"""Replays the vectors ``momentum-smoe``: stacks of MoE layers under four residual rules, with their states."""

import re

import pytest
import torch
from replay import append_one, biased_experts, context, router
from torch.nn import functional as F

from moetrain.moe.capacity.policies import DroplessConfig
from moetrain.moe.layer import MoELayer
from moetrain.moe.losses.balance import ExpertBalanceConfig
from moetrain.moe.mixers.base import ResidualConfig
from moetrain.moe.mixers.momentum import AdamConfig, MomentumConfig, RobustMomentumConfig
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "momentum-smoe"
META, DATA = golden(SLUG)
X, LAYERS, K = DATA["x"], META["layers"], META["K"]
NORM_EPS = float(re.search(r"eps ([\d.e-]*\d)", META["tensor_groups"]["param.*"]).group(1))


def number(name):
    return float(re.search(rf"\b{name}=([\d.]*\d)", META["tensor_groups"]["robust.*"]).group(1))


HEAVY_BALL = dict(mu=META["mu"], gamma=META["gamma2"], subtract=True)
RULES = {
    "smoe": ResidualConfig(),
    "momentum": MomentumConfig(**HEAVY_BALL),
    # the released code drops the residual in the first layer
    "adam": AdamConfig(**HEAVY_BALL, step=META["gamma1"], beta1=META["beta1"], beta2=META["beta2"], decay=1.0),
    "robust": RobustMomentumConfig(kappa=number("kappa"), smoothness=number("L"), rate=number("p")),
}


def layer(index):
    p = {name.removeprefix(f"param.{index}."): tensor for name, tensor in DATA.items() if name.startswith(f"param.{index}.")}
    gate = router(X.shape[-1] + 1, META["E"], X.dtype, top_k=K, score="logit", selected_softmax=True, logit_bias=True)
    gate.load_state_dict({"weight": F.pad(p["gate.gate.weight"], (0, 1)), "bias": p["gate.gate.bias"]})
    experts = biased_experts(p["w1"], p["b1"], p["w2"], p["b2"])
    losses = {"balance": ExpertBalanceConfig(coefficient=1 / K, scope="rank").build()}
    made = MoELayer(router=gate, capacity=DroplessConfig().build(), experts=experts, losses=losses)
    return made, lambda h: F.layer_norm(h, h.shape[-1:], p["layer_norm.weight"], p["layer_norm.bias"], NORM_EPS)


def run(rule, x, ctx):
    """Output and carried state of each layer."""
    mixer = RULES[rule].build()
    for index in range(LAYERS):
        moe, norm = layer(index)
        here = ctx.forward.at(f"layers.{index}")
        f = lambda h: moe(append_one(h), here)[..., :-1]  # noqa: B023, E731
        if rule == "robust":
            x = mixer(x, f(mixer.look_ahead(x, here)), here)
        elif META["pre_lnorm"]:
            x = mixer(x, f(norm(x)), here)
        else:
            x = norm(mixer(x, f(x), here))
        yield x, dict(ctx.carry)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{SLUG}-{rule}")
def test_stack(rule):
    x = X.clone().requires_grad_()
    ctx = context(X.shape[0] * X.shape[1], batch_size=X.shape[0])
    for index, (h, carry) in enumerate(run(rule, x, ctx)):
        assert_close(h, DATA[f"{rule}.{'x' if rule == 'robust' else 'h'}.{index}"], kind="golden")
        states = {"m": carry.get("momentum")} | dict(zip("pv", carry.get("adam", (0, None, None))[1:], strict=True))
        for name, state in states.items():
            if state is not None:
                assert_close(state, DATA[f"{rule}.{name}.{index}"], kind="golden")
    if f"{rule}.grad_x" in DATA:
        (h * DATA["cotangent"]).sum().backward()
        assert_close(x.grad, DATA[f"{rule}.grad_x"], kind="golden")
    if rule == "smoe":  # the reference counts in float32
        assert_close(ctx.forward.losses["balance"].float(), DATA["smoe.balance_loss_sum"], kind="golden")


def test_robust_coefficients():
    assert_close(torch.tensor(RULES["robust"].coefficients()), DATA["robust.coefficients"], kind="golden")


def test_every_tensor_is_replayed():
    states = {"smoe": "h", "momentum": "hm", "adam": "hmpv", "robust": "x"}
    outputs = {f"{rule}.{name}.{i}" for rule, names in states.items() for name in names for i in range(LAYERS)}
    outputs |= {f"{rule}.grad_x" for rule in ("smoe", "momentum", "adam")}
    others = {"x", "cotangent", "smoe.balance_loss_sum", "robust.coefficients"}
    assert {name for name in DATA if not name.startswith("param.")} == outputs | others
