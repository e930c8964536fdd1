"""Replays the vectors ``rmoe``: stacks of layers with a recurrent router, for both cells.

The reference's softmax over experts is float32; what depends on it is compared as such.
"""

import pytest
import torch
from replay import context, route_logits, stack_experts

from moetrain.moe.capacity.policies import DroplessConfig
from moetrain.moe.experts.ffn import FFNExpertsConfig
from moetrain.moe.layer import MoEParts
from moetrain.moe.losses.balance import ExpertBalanceConfig
from moetrain.moe.routers.base import tie_routers
from moetrain.moe.routers.recurrent import RecurrentTopKRouterConfig
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "rmoe"
META, DATA = golden(SLUG)
E, LAYERS, P = META["E"], META["layers"], META["router_hidden"]
GATES = {"gru": "rzn", "rnn": "n"}
"""By cell, in torch's order."""


def make_layers(cell):
    router = RecurrentTopKRouterConfig(top_k=META["K"], renormalise=True, state_size=P, cell=cell)
    parts = MoEParts(router=router, experts=FFNExpertsConfig(num_experts=E, width=META["F"]), capacity=DroplessConfig())
    layers = [parts.build(META["D"], dtype=torch.float64) for _ in range(LAYERS)]
    tie_routers(layer.router for layer in layers)
    shared = {
        f"router.cell.{kind}_{side}h": torch.cat([DATA[f"{cell}.rnn.{kind}_{side}{gate}"] for gate in GATES[cell]])
        for kind in ("weight", "bias")
        for side in "ih"
    }
    for i, layer in enumerate(layers):
        w_in, w_out = stack_experts(DATA, f"{cell}.layer{i}.experts", range(E), ("w1", "w3", "w2"))
        own = {"router.projection": DATA[f"{cell}.layer{i}.weight1"], "router.weight": DATA[f"{cell}.layer{i}.weight2"]}
        layer.load_state_dict({**shared, **own, "experts.w_in": w_in, "experts.w_out": w_out})
    return layers


@pytest.mark.parametrize("cell", [cell for cell in GATES if f"{cell}.x" in DATA], ids=lambda cell: f"{SLUG}-{cell}")
def test_stack(cell):
    layers, x = make_layers(cell), DATA[f"{cell}.x"].clone().requires_grad_()
    ctx, hidden, logits = context(x.shape[0] * x.shape[1]).forward, x, []
    for i, layer in enumerate(layers):
        at = ctx.at(f"layers.{i}")
        routing = layer.router(hidden.flatten(0, 1), at)
        assert_close(at.carry["ffn/router_state"], DATA[f"{cell}.state.{i}"].float(), kind="golden")
        assert_close(routing.logits, DATA[f"{cell}.logits.{i}"].float(), kind="golden")
        logits.append(routing.logits)
        hidden = hidden + layer.executor(hidden.flatten(0, 1), routing, layer.experts, at).view_as(x)
        assert_close(hidden, DATA[f"{cell}.h.{i}"].float(), kind="golden")
    (hidden * DATA[f"{cell}.cotangent"]).sum().backward()
    assert_close(x.grad, DATA[f"{cell}.grad_x"].float(), kind="golden")
    router = layers[0].router
    assert_close(router.projection.grad, DATA[f"{cell}.grad_weight1_layer0"].float(), kind="golden")
    assert_close(router.cell.weight_hh.grad[-P:], DATA[f"{cell}.grad_rnn_weight_hn"].float(), kind="golden")

    every = torch.cat(logits).detach()
    at = context(every.shape[0])
    loss = ExpertBalanceConfig(scope="rank", normalisation="per_token").build()(route_logits(every, at, top_k=META["K"]), at)
    assert_close(loss, DATA[f"{cell}.load_balancing_loss"].float(), kind="golden")


def test_every_tensor_is_replayed():
    parts = {"x", "cotangent", "grad_x", "grad_weight1_layer0", "grad_rnn_weight_hn", "load_balancing_loss"}
    parts |= {f"{part}.{i}" for part in ("h", "state", "logits") for i in range(LAYERS)}
    outputs = {f"{cell}.{part}" for cell in GATES for part in parts if f"{cell}.x" in DATA}
    assert {key for key in DATA if not key.split(".")[1].startswith(("layer", "rnn"))} == outputs
