"""Replays the vectors ``tutel-gates``: slots and weights of extract_critical, its losses, the cosine gate."""

import math
import re

import pytest
import torch
from replay import DrawnContext, context, route_logits

from moetrain.moe.capacity.policies import SlotsConfig
from moetrain.moe.losses.balance import SwitchBalanceConfig
from moetrain.moe.losses.load_importance import LoadImportanceConfig
from moetrain.moe.routers.cosine import CosineTopKRouterConfig
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "tutel-gates"
META, DATA = golden(SLUG)
GATE_NOISE = 1.0  # the reference's default, which the description leaves out


def policy(case):
    """Tutel's rule; a factor of 0 or below asks for buffers no larger than the largest count, and we have no buffers."""
    return SlotsConfig(
        factor=abs(case["capacity_factor"]) or math.inf,
        round="per_choice",
        multiple=case["alignment"],
        scope="rank",
        priority="first_probability" if case["batch_prioritized_routing"] else "position",
    ).build()


@pytest.mark.parametrize("case", META["cases"], ids=lambda case: f"{SLUG}-{case['name']}")
def test_extract_critical(case):
    name, k = case["name"], case["k"]
    logits = DATA["logits"].clone().requires_grad_()
    tokens, experts = logits.shape
    ctx = context(tokens)
    # a single choice keeps its probability
    routing = route_logits(logits, ctx, top_k=k, renormalise=case["normalize_gate"] and k > 1)
    assert torch.equal(routing.expert_TK.T, DATA[f"{name}.indices"])
    locations = policy(case).places(routing, ctx, group_size=tokens)
    assert torch.equal(locations.view(tokens, k).T, DATA[f"{name}.locations"])
    assert_close(routing.weight_TK.T, DATA[f"{name}.gates"], kind="golden")

    largest = math.ceil(int(routing.selected.max()) / case["alignment"]) * case["alignment"]
    slots = [largest] if case["capacity_factor"] <= 0 else []
    slots += [policy(case).capacity(tokens, k, experts, training=True)] if case["capacity_factor"] else []
    assert min(slots) == case["capacity"]
    if case["capacity_factor"]:
        assert torch.equal(policy(case)(routing, ctx).expert >= 0, locations < case["capacity"])

    aux = SwitchBalanceConfig(scope="rank").build()(routing, ctx)
    assert_close(aux.view(1), DATA[f"{name}.l_aux"], kind="golden")
    cotangent = torch.linspace(-1, 1, tokens, dtype=logits.dtype)
    ((routing.weight_TK.T * cotangent).sum() + aux).backward()
    assert_close(logits.grad, DATA[f"{name}.grad_logits"], kind="golden")


def test_load_importance_loss():
    # the reference computes it in float32
    top_k = int(re.search(r"\(k=(\d+)\)", META["tensors"]["load_importance.loss"]["meaning"]).group(1))
    logits = DATA["logits"].float().requires_grad_()
    ctx = DrawnContext(context(logits.shape[0]), {"logit_noise": torch.special.ndtr(DATA["noise"])})
    routing = route_logits(logits, ctx, top_k=top_k, logit_noise=GATE_NOISE)
    loss = LoadImportanceConfig(scope="rank", compared="probs").build()(routing, ctx)
    assert_close(loss.view(1), DATA["load_importance.loss"], kind="golden")
    loss.backward()
    assert_close(logits.grad, DATA["load_importance.grad_logits"], kind="golden")


def test_cosine_logits():
    x, size = DATA["cosine.x"], DATA["cosine.proj_b"].numel()
    made = CosineTopKRouterConfig(top_k=1, projection_size=size).build(x.shape[1], DATA["cosine.sim_matrix"].shape[1], dtype=x.dtype)
    state = {
        "projection": DATA["cosine.proj_w"],
        "projection_bias": DATA["cosine.proj_b"],
        "weight": DATA["cosine.sim_matrix"].T,
        "log_scale": DATA["cosine.log_scale"],
    }
    made.load_state_dict(state)
    assert_close(made.logits(x), DATA["cosine.logits"], kind="golden")


def test_every_tensor_is_replayed():
    outputs = {f"{c['name']}.{part}" for c in META["cases"] for part in ("indices", "locations", "gates", "l_aux", "grad_logits")}
    cosine = {f"cosine.{part}" for part in ("x", "proj_w", "proj_b", "sim_matrix", "log_scale", "logits")}
    assert set(DATA) == {"logits", "noise", "load_importance.loss", "load_importance.grad_logits"} | outputs | cosine
