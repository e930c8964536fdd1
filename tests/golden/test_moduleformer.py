"""Replays the vectors ``moduleformer`` as far as gate, losses and the FFN layer go; its attention is a mixer of its own."""

import pytest
import torch
from replay import context
from torch.nn import functional as F

from moetrain.moe.losses.balance import ExpertBalanceConfig
from moetrain.moe.losses.information import MutualInformationConfig
from moetrain.moe.losses.z import ZLossConfig
from moetrain.moe.routers.moduleformer import ModuleFormerRouterConfig
from moetrain.moe.routers.topk import TopKRouterConfig
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "moduleformer"
META, DATA = golden(SLUG)
LATER = {"sb", "attn"}
"""Stick-breaking attention with experts."""
SWITCH_Z = 0.1  # the z-loss's share of the 'switch' loss
AUX_WEIGHT = 0.5  # of the layer's stored gradients


def tokens():
    return DATA["x"].reshape(-1, META["D"]).clone()


def gate(prefix):
    """The router with the reference's weights, whichever type they are of."""
    given = {key.removeprefix(prefix): value for key, value in DATA.items() if key.startswith(prefix)}
    names = {"w_gate.weight": "hidden_weight", "expert_centroids": "weight", "temperature": "log_scale"}
    if "w_gate.3.weight" in given:
        names = {"w_gate.0.weight": "hidden_weight", "w_gate.0.bias": "hidden_bias", "w_gate.3.weight": "weight"}
    elif "w_gate.0.weight" in given:
        names = {"w_gate.0.weight": "weight"}
    if len(names) == 1:
        config = TopKRouterConfig(top_k=META["K"])
    else:
        kind = "mlp" if "hidden_bias" in names.values() else "cosine"
        config = ModuleFormerRouterConfig(top_k=META["K"], gate=kind, gate_size=META["gating_size"])
    made = config.build(META["D"], META["E"], dtype=torch.float64)
    made.load_state_dict({names[key]: value for key, value in given.items()})
    return made


def auxiliary(kind, routing, ctx, **settings):
    if kind == "mi":
        return MutualInformationConfig(scope="rank", **settings).build()(routing, ctx)
    return ExpertBalanceConfig(scope="rank").build()(routing, ctx) + SWITCH_Z * ZLossConfig().build()(routing, ctx)


@pytest.mark.parametrize("case", META["cases"], ids=lambda case: f"{SLUG}-{case['name']}")
def test_gate(case):
    name, x = case["name"], tokens().requires_grad_()
    ctx = context(x.shape[0])
    routing = gate(f"{name}.param.")(x, ctx)
    assert_close(routing.probs, DATA[f"{name}.probs"], kind="golden")
    assert torch.equal(routing.expert_TK, DATA[f"{name}.topk_indices"])
    assert_close(routing.weight_TK, DATA[f"{name}.topk_gates"], kind="golden")
    aux = auxiliary(case["aux_loss"], routing, ctx)
    # the reference counts choices in float32 in its 'switch' loss
    exact = torch.float64 if case["aux_loss"] == "mi" else torch.float32
    assert_close(aux.to(exact), DATA[f"{name}.aux_loss"].to(exact), kind="golden")
    aux.backward()
    assert_close(x.grad.to(exact), DATA[f"{name}.aux_grad_x"].to(exact), kind="golden")


def test_padding_as_released_and_excluded():
    x, valid = tokens(), DATA["gate_skip.skip_mask"].flatten().bool()
    ctx = context(x.shape[0], valid=valid)
    routing = gate("gate_skip.param.")(x, ctx)
    assert_close(torch.where(valid[:, None], routing.probs, 0.0), DATA["gate_skip.probs"], kind="golden")
    released = auxiliary("mi", routing, ctx, padding="released")
    assert_close(released, DATA["gate_skip.aux_loss"], kind="golden")
    kept = x[valid]
    alone = auxiliary("mi", gate("gate_skip.param.")(kept, context(kept.shape[0])), context(kept.shape[0]))
    assert_close(auxiliary("mi", routing, ctx), alone, kind="golden")


def test_ffn_layer():
    """Exact-erf GELU experts written out: what is replayed is the gate inside a layer."""
    x = tokens().requires_grad_()
    w_in, w_out = (DATA[f"moe.param.{name}.weight"].clone().requires_grad_() for name in ("experts", "output_experts"))
    ctx = context(x.shape[0])
    routing = gate("moe.param.gate.")(x, ctx)
    rows = x[routing.token].unsqueeze(1) @ w_in[routing.expert]
    y = torch.zeros_like(x).index_add(0, routing.token, (F.gelu(rows) @ w_out[routing.expert]).squeeze(1) * routing.weight[:, None])
    assert_close(y.view_as(DATA["moe.y"]), DATA["moe.y"], kind="golden")
    aux = auxiliary("mi", routing, ctx)
    assert_close(aux, DATA["moe.aux_loss"], kind="golden")
    ((y.view_as(DATA["x"]) * DATA["moe.cotangent"]).sum() + AUX_WEIGHT * aux).backward()
    assert_close(x.grad.view_as(DATA["x"]), DATA["moe.grad_x"], kind="golden")
    assert_close(w_in.grad, DATA["moe.grad.experts.weight"], kind="golden")
    assert_close(w_out.grad, DATA["moe.grad.output_experts.weight"], kind="golden")


def test_every_tensor_is_replayed_or_known_to_come_later():
    groups = {key.split(".")[0] for key in DATA}
    assert groups <= {case["name"] for case in META["cases"]} | {"x", "gate_skip", "moe"} | LATER
