"""Replays the vectors ``adamoe``: null experts, both released losses and the intended one.

The reference's softmax is float32; what depends on it is compared as such.
"""

import re

import torch
from replay import context, route_logits, stack_experts

from moetrain.moe.capacity.policies import DroplessConfig
from moetrain.moe.experts import ZeroExpertsConfig
from moetrain.moe.experts.ffn import FFNExpertsConfig
from moetrain.moe.layer import MoEParts
from moetrain.moe.losses.balance import ExpertBalanceConfig
from moetrain.moe.routers.topk import TopKRouterConfig
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "adamoe"
META, DATA = golden(SLUG)
E, NULL, K = META["E_true"], META["n_null"], META["K"]
NAMES = ("w1", "w3", "w2")
INTENDED = ExpertBalanceConfig(scope="rank", pool_zero=True).build()
RELEASED = ExpertBalanceConfig(scope="rank", normalisation="per_token").build()


def settings(null, top_k):
    return dict(top_k=top_k, renormalise=True, renormalise_null=False, zero_experts=ZeroExpertsConfig(num_null=null))


def make_layer():
    parts = MoEParts(
        router=TopKRouterConfig(**settings(NULL, K)), experts=FFNExpertsConfig(num_experts=E, width=META["F"]), capacity=DroplessConfig()
    )
    layer = parts.build(META["D"], dtype=torch.float64)
    w_in, w_out = stack_experts(DATA, "param.experts", range(E), NAMES)
    gate = torch.cat([DATA["param.gate.weight"], DATA["param.gate2.weight"]])
    layer.load_state_dict({"router.weight": gate, "experts.w_in": w_in, "experts.w_out": w_out})
    return layer


def test_layer():
    layer, x = make_layer(), DATA["x"].clone().requires_grad_()
    ctx = context(x.shape[0] * x.shape[1])
    routing = layer.router(x.flatten(0, 1), ctx)
    assert_close(routing.logits, DATA["router_logits"], kind="golden")
    assert torch.equal((routing.expert_TK < E).sum(1), DATA["num_true_experts"])
    assert_close(RELEASED(routing, ctx), DATA["loss_released_exp2"], kind="golden")
    assert_close(INTENDED(routing, ctx), DATA["derived.loss_intended"].float(), kind="golden")

    y = layer(x, ctx)
    assert_close(y, DATA["y"].float(), kind="golden")
    (y * DATA["cotangent"]).sum().backward()
    assert_close(x.grad, DATA["grad_x"].float(), kind="golden")
    experts, null = layer.router.weight.grad.split([E, NULL])
    assert_close(experts, DATA["grad_gate"].float(), kind="golden")
    assert_close(null, DATA["grad_gate2"].float(), kind="golden")
    assert_close(null, torch.zeros_like(null), kind="golden")


def test_loss_of_the_lora_experiment():
    about = META["tensors"]["exp1.gate_logits"]["about"] + META["tensors"]["exp1.loss"]["about"]
    null, top_k = (int(re.search(pattern, about).group(1)) for pattern in (r"(\d+) null", r"top-(\d+)"))
    logits = DATA["exp1.gate_logits"]
    ctx = context(logits.shape[0])
    routing = route_logits(logits, ctx, num_experts=logits.shape[1] - null, **settings(null, top_k))
    assert_close(INTENDED(routing, ctx), DATA["exp1.loss"], kind="golden")


def test_every_tensor_is_replayed():
    parameters = {f"param.experts.{e}.{name}.weight" for e in range(E) for name in NAMES} | {"param.gate.weight", "param.gate2.weight"}
    outputs = {"x", "y", "cotangent", "router_logits", "num_true_experts", "grad_x", "grad_gate", "grad_gate2"}
    losses = {"loss_released_exp2", "derived.loss_intended", "exp1.gate_logits", "exp1.loss"}
    assert set(DATA) == parameters | outputs | losses
