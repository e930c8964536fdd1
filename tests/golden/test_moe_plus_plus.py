"""Replays the vectors ``moe-plus-plus``: a stack of layers with gating residuals and every kind of expert."""

from dataclasses import replace

import torch
from replay import context, stack_experts

from moetrain.moe.capacity.by_kind import SlotsByKindConfig
from moetrain.moe.capacity.policies import DroplessConfig
from moetrain.moe.experts import ZeroExpertsConfig
from moetrain.moe.experts.ffn import FFNExpertsConfig
from moetrain.moe.layer import MoEParts
from moetrain.moe.losses.heterogeneous import HeterogeneousBalanceConfig
from moetrain.moe.routers.residual import ResidualTopKRouterConfig
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "moe-plus-plus"
META, DATA = golden(SLUG)
E, FFN, CONSTANT, LAYERS, TAU = META["E"], META["nf"], META["n_constant"], META["layers"], META["tau"]
NAMES = ("gate_proj", "up_proj", "down_proj")


def make_layer(number):
    prefix = f"layer{number}.moe."
    first = DATA.get(prefix + "gate.wg.0.weight")
    router = ResidualTopKRouterConfig(
        top_k=META["top_k"], renormalise=True, renormalise_null=False, hidden_multiple=0 if first is None else first.shape[0] // E,
        zero_experts=ZeroExpertsConfig(num_constant=CONSTANT, num_copy=E - FFN - CONSTANT - 1, num_null=1),
        standard_deviation=1.0 if META["logits_norm"] else None,
    )  # fmt: skip
    parts = MoEParts(router=router, experts=FFNExpertsConfig(num_experts=FFN, width=META["F"]), capacity=DroplessConfig())
    layer = parts.build(META["D"], dtype=torch.float32)
    constants = [f"{prefix}experts.experts.{FFN + i}" for i in range(CONSTANT)]
    w_in, w_out = stack_experts(DATA, f"{prefix}experts.experts", range(FFN), NAMES)
    state = {
        "router.weight": DATA[prefix + ("gate.wg.weight" if first is None else "gate.wg.2.weight")],
        "router.residual": DATA[prefix + "gate.gate_map.weight"],
        "experts.w_in": w_in,
        "experts.w_out": w_out,
        "zero_experts.mix": torch.stack([DATA[f"{name}.wg.weight"] for name in constants]),
        "zero_experts.vector": torch.stack([DATA[f"{name}.constant"] for name in constants]),
    }
    layer.load_state_dict(state if first is None else {**state, "router.hidden": first})
    return layer


def test_stack():
    layers, x = [make_layer(i) for i in range(LAYERS)], DATA["x"].clone().requires_grad_()
    ctx = context(x.shape[0] * x.shape[1]).forward
    scale = 1 if META["moe_feature_no_mul_topk"] else META["top_k"]  # of what enters the experts, not the router
    hidden = x
    for i, layer in enumerate(layers):
        at = ctx.at(f"layers.{i}")
        tokens = hidden.flatten(0, 1)
        routing = layer.router(tokens, at)
        scores = at.carry["ffn/scores"]
        assert_close(scores, DATA[f"router_scores.{i}"], kind="golden")
        y = layer.executor(scale * tokens, routing, layer.experts, at) + layer.zero_experts(scale * tokens, routing)
        assert_close(y.view_as(x), DATA[f"y.{i}"], kind="golden")
        hidden = hidden + y.view_as(x)
        if i == 0:
            loss = HeterogeneousBalanceConfig(tau=TAU, scope="rank").build()(replace(routing, probs=torch.softmax(scores, dim=1)), at)
            assert_close(loss, DATA["derived.lb_loss"].float(), kind="golden")
    (hidden * DATA["cotangent"]).sum().backward()
    if "grad_x" in DATA:
        assert_close(x.grad, DATA["grad_x"], kind="golden")
    assert_close(layers[0].zero_experts.vector.grad[0], DATA["grad_constant"], kind="golden")
    assert_close(layers[-1].router.residual.grad, DATA["grad_gate_map_last"], kind="golden")


def test_capacity():
    policy = SlotsByKindConfig(factor=META["gamma"], tau=TAU, choices=1).build()
    exact = [META["gamma"] * META["B"] * META["S"] / divisor for divisor in policy.divisors(FFN, E - FFN)]
    expected = torch.tensor([exact[0]] * FFN + [exact[1]] * (E - FFN), dtype=torch.float64)
    assert_close(DATA["derived.capacity"], expected, kind="golden")


def test_every_tensor_is_replayed():
    outputs = {"x", "cotangent", "grad_constant", "grad_gate_map_last", "derived.lb_loss", "derived.capacity"}
    by_layer = {f"{part}.{i}" for part in ("y", "router_scores") for i in range(LAYERS)}
    assert {key for key in DATA if not key.startswith("layer")} - {"grad_x"} == outputs | by_layer
