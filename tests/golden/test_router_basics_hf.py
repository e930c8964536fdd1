"""Replays the vectors ``router-basics-hf``: routers of the public models as one TopKRouter."""

import re

import pytest
import torch
from replay import context, dense_map, router

from moetrain.moe.capacity.policies import SlotsConfig
from moetrain.moe.experts.zero import ZeroExpertsConfig
from moetrain.moe.losses.balance import ExpertBalanceConfig, SwitchBalanceConfig
from moetrain.moe.losses.z import ZLossConfig
from moetrain.moe.routers.sparsemixer import SparseMixerConfig
from moetrain.moe.routing import fixed_routing
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "router-basics-hf"
META, DATA = golden(SLUG)


def settings(case, meta):
    """The TopKRouter settings that a case's class and configuration mean."""
    name, config = case["name"], case.get("config", {})
    top_k = config.get("num_experts_per_tok", meta["K"])
    sigmoid_v3 = dict(score="sigmoid", selection_bias=True, num_groups=config.get("n_group") or 1,
                      groups_per_token=config.get("topk_group") or 1, group_score_experts=2 if (config.get("n_group") or 1) > 1 else 1,
                      renormalise=config.get("norm_topk_prob", True), renormalise_epsilon=1e-20,
                      scale=config.get("routed_scaling_factor", 1.0))  # fmt: skip
    table = {
        "mixtral": dict(renormalise=True),
        "qwen3_norm": dict(renormalise=config.get("norm_topk_prob", False)),
        "qwen3_raw": dict(renormalise=config.get("norm_topk_prob", False)),
        "olmoe": dict(renormalise=config.get("norm_topk_prob", False)),
        "deepseek_v2_greedy": dict(scale=config.get("routed_scaling_factor", 1.0)),
        "deepseek_v2_group": dict(scale=config.get("routed_scaling_factor", 1.0), num_groups=config.get("n_group") or 1,
                                  groups_per_token=config.get("topk_group") or 1),
        "deepseek_v3": sigmoid_v3,
        "deepseek_v3_nogroup_raw": sigmoid_v3,
        "minimax_m2_like": sigmoid_v3,
        "longcat": dict(selection_bias=True, scale=config.get("routed_scaling_factor", 1.0),
                        zero_experts=ZeroExpertsConfig(num_copy=config.get("zero_expert_num", 0))),
        "ernie4_5": dict(selection_bias=True, renormalise=True, renormalise_minimum=config.get("moe_norm_min", 0.0)),
        "gpt_oss": dict(score="logit", selected_softmax=True, logit_bias=True),
        "granite": dict(score="logit", selected_softmax=True),
    }  # fmt: skip
    return dict(top_k=top_k, **table[name])


SPARSE_MIXER, LLAMA4 = "phimoe_eval", "llama4"
ROUTERS = [case for case in META["cases"] if f"{case['name']}.topk_weights" in DATA and case["name"] != SPARSE_MIXER]


def test_every_case_is_replayed():
    names = {case["name"] for case in META["cases"]}
    replayed = {case["name"] for case in ROUTERS} | {"switch_cap_big", "switch_cap_small", "hf_lbl", SPARSE_MIXER, LLAMA4}
    assert names <= replayed


@pytest.mark.parametrize("case", ROUTERS, ids=lambda case: f"{SLUG}-{case['name']}")
def test_router(case):
    name, x, weight = case["name"], DATA["x"], DATA["weight"]
    chosen = settings(case, META)
    made = router(x.shape[1], weight.shape[0] - chosen.get("zero_experts", ZeroExpertsConfig()).count, x.dtype, **chosen)
    made.weight = torch.nn.Parameter(weight.clone())
    if made.bias is not None:
        made.bias = torch.nn.Parameter(DATA["linear_bias"].clone())
    if made.selection_bias is not None:
        made.selection_bias = DATA["correction_bias"].clone()
    x = x.clone().requires_grad_()
    routing = made(x, context(x.shape[0]))
    assert_close(routing.logits, DATA[f"{name}.logits"], kind="golden")
    weights, order = routing.weight_TK.sort(dim=1, descending=True, stable=True)
    index = routing.expert_TK.gather(1, order)
    expected_weights, expected = DATA[f"{name}.topk_weights"], DATA[f"{name}.topk_indices"]
    assert_close(weights, expected_weights, kind="golden")
    # sets where two weights tie
    assert torch.equal(index.sort(dim=1).values, expected.sort(dim=1).values)
    if f"{name}.grad_x" in DATA:
        (weights * DATA["cotangent"]).sum().backward()
        assert_close(x.grad, DATA[f"{name}.grad_x"], kind="golden")
        assert_close(made.weight.grad, DATA[f"{name}.grad_weight"], kind="golden")


def test_sparse_mixer():
    name, x, weight = SPARSE_MIXER, DATA["x"], DATA["weight"]
    band = float(re.search(r"jitter_eps=([\d.]*\d)", META["tensor_groups"][f"{name}.*"]).group(1))
    made = SparseMixerConfig(top_k=DATA[f"{name}.topk_indices"].shape[1], band=band).build(x.shape[1], weight.shape[0], dtype=x.dtype)
    made.weight = torch.nn.Parameter(weight.clone())
    routing = made(x, context(x.shape[0], training=False))
    assert_close(routing.logits, DATA[f"{name}.logits"], kind="golden")
    selected, weights = dense_map(routing)
    expected = torch.zeros_like(weights).scatter(1, DATA[f"{name}.topk_indices"], DATA[f"{name}.topk_weights"])
    assert torch.equal(selected, expected > 0)
    assert_close(weights, expected, kind="golden")


def test_llama4_scores():
    """The gate: the model multiplies the expert's input by these, where ours weigh its output."""
    expected = DATA[f"{LLAMA4}.dense_scores"]
    top_k = int((expected[0] > 0).sum())
    made = router(DATA["x"].shape[1], expected.shape[1], DATA["x"].dtype, top_k=top_k, score="sigmoid")
    made.weight = torch.nn.Parameter(DATA["weight"].clone())
    assert_close(dense_map(made(DATA["x"], context(DATA["x"].shape[0])))[1], expected, kind="golden")


@pytest.mark.parametrize("case", [c for c in META["cases"] if "expert_capacity" in c], ids=lambda c: f"{SLUG}-{c['name']}")
def test_switch_capacity(case):
    x, batch = DATA["x"], META["B"]
    made = router(x.shape[1], DATA["weight"].shape[0], x.dtype, top_k=1)
    made.weight = torch.nn.Parameter(DATA["weight"].clone())
    ctx = context(x.shape[0], batch_size=batch)
    routing = made(x, ctx)
    kept = SlotsConfig(tokens=case["expert_capacity"]).build()(routing, ctx)
    selected, _ = dense_map(kept)
    expected = DATA[f"{case['name']}.dispatch_onehot"].reshape(x.shape[0], -1)
    assert torch.equal(selected, expected.bool())
    assert_close(routing.weight, DATA[f"{case['name']}.top_prob"].flatten(), kind="golden")


def test_switch_losses():
    x, batch = DATA["x"], META["B"]
    made = router(x.shape[1], DATA["weight"].shape[0], x.dtype, top_k=1)
    made.weight = torch.nn.Parameter(DATA["weight"].clone())
    ctx = context(x.shape[0], batch_size=batch)
    routing = made(x, ctx)
    assert_close(SwitchBalanceConfig().build()(routing, ctx), DATA["switch.load_balancing_loss"], kind="golden")
    assert_close(ZLossConfig().build()(routing, ctx), DATA["switch.z_loss"], kind="golden")


@pytest.mark.parametrize("masked", [False, True])
def test_mixtral_load_balancing_loss(masked):
    """One loss over the concatenated layers, with f relative to tokens."""
    case = next(c for c in META["cases"] if c["name"] == "hf_lbl")
    layers = [DATA[f"hf_lbl.gate_logits.{i}"].clone().requires_grad_() for i in range(case["layers"])]
    logits = torch.cat(layers)
    probs = torch.softmax(logits, dim=1)
    valid = DATA["hf_lbl.attention_mask"].flatten().bool().repeat(case["layers"]) if masked else None
    index = probs.detach().topk(case["top_k"], dim=1).indices
    routing = fixed_routing(index, probs.gather(1, index), num_experts=logits.shape[1], logits=logits, probs=probs, valid=valid)
    ctx = context(logits.shape[0], valid=valid)
    loss = ExpertBalanceConfig(scope="rank", normalisation="per_token").build()(routing, ctx)
    assert_close(loss, DATA["hf_lbl.loss_masked" if masked else "hf_lbl.loss"], kind="golden")
    if not masked:
        loss.backward()
        assert_close(layers[0].grad, DATA["hf_lbl.grad_gate_logits.0"], kind="golden")
