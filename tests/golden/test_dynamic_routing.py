"""Replays the vectors ``dynamic-routing``: top-p routing with outputs, gradients and both losses."""

import pytest
import torch
from replay import context, stack_experts

from moetrain.moe.capacity.policies import DroplessConfig
from moetrain.moe.experts.ffn import FFNExpertsConfig
from moetrain.moe.layer import MoEParts
from moetrain.moe.losses.balance import ExpertBalanceConfig
from moetrain.moe.losses.entropy import EntropyConfig
from moetrain.moe.routers.top_p import TopPRouterConfig
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "dynamic-routing"
META, DATA = golden(SLUG)
E, F = META["E"], META["F"]
NAMES = ("gate_proj", "up_proj", "down_proj")


def make_layer(threshold):
    parts = MoEParts(
        router=TopPRouterConfig(threshold=threshold), experts=FFNExpertsConfig(num_experts=E, width=F), capacity=DroplessConfig()
    )
    layer = parts.build(META["D"], dtype=torch.float64)
    w_in, w_out = stack_experts(DATA, "param.experts", range(E), NAMES)
    layer.load_state_dict({"router.weight": DATA["param.router.weight"], "experts.w_in": w_in, "experts.w_out": w_out})
    return layer


@pytest.mark.parametrize("threshold", META["thresholds"], ids=lambda p: f"{SLUG}-p{p}")
def test_top_p_layer(threshold):
    name = f"p{threshold}"
    layer, x = make_layer(threshold), DATA["x"].clone().requires_grad_()
    tokens = x.shape[0] * x.shape[1]
    ctx = context(tokens)
    routing = layer.router(x.flatten(0, 1), ctx)
    index, weight = (DATA[f"{name}.sorted_{part}"].view(tokens, E) for part in ("indices", "weights"))
    real = index >= 0
    assert torch.equal(routing.token, real.nonzero()[:, 0])
    ours = torch.stack([routing.token, routing.slot, routing.expert], dim=1)
    token, slot = real.nonzero(as_tuple=True)
    order = (routing.token * E + routing.slot).argsort()
    assert torch.equal(ours[order], torch.stack([token, slot, index[real]], dim=1))
    assert_close(routing.weight[order], weight[real], kind="golden")
    assert torch.equal(torch.bincount(routing.token, minlength=tokens), DATA[f"{name}.num_active"])
    balance = ExpertBalanceConfig(normalisation="per_token", scope="rank").build()
    assert_close(balance(routing, ctx), DATA[f"{name}.derived.balance_loss"], kind="golden")
    assert_close(EntropyConfig().build()(routing, ctx), DATA[f"{name}.derived.dynamic_loss"], kind="golden")

    y = layer(x, ctx)
    assert_close(y, DATA[f"{name}.y"], kind="golden")
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert_close(x.grad, DATA[f"{name}.grad_x"], kind="golden")
    assert_close(layer.router.weight.grad, DATA[f"{name}.grad_router"], kind="golden")


def test_every_tensor_is_replayed():
    parts = ("sorted_indices", "sorted_weights", "num_active", "y", "grad_x", "grad_router", "derived.balance_loss", "derived.dynamic_loss")
    outputs = {f"p{p}.{part}" for p in META["thresholds"] for part in parts}
    parameters = {f"param.experts.{e}.{part}.weight" for e in range(E) for part in NAMES}
    assert set(DATA) == {"x", "param.router.weight"} | outputs | parameters
