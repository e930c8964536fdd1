"""Replays the vectors ``router-basics-megatron``: score functions, dropping, aux losses, bias update, GShard."""

import math
import re

import pytest
import torch
from replay import context, dense_map, route_logits, router

from moetrain.moe.capacity.policies import SlotsConfig
from moetrain.moe.context import LayerStatistics
from moetrain.moe.losses.balance import ExpertBalanceConfig, SwitchBalanceConfig
from moetrain.moe.losses.z import ZLossConfig
from moetrain.moe.routers.assignment import BaseConfig, SinkhornConfig, sinkhorn
from moetrain.moe.routers.expert_choice import ExpertChoiceConfig
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "router-basics-megatron"
META, DATA = golden(SLUG)
K, GROUPS, GROUP_TOPK = META["K"], META["num_groups"], META["group_topk"]
OTHERS = {"sinkhorn", "base", "expert_choice"}
"""Routers of their own."""


def number(pattern, text):
    """The number that a description states."""
    return float(re.search(pattern, text).group(1))


FORMULAS = {case["name"]: case.get("formula", "") for case in META["cases"]}


def scale_of(name):
    return number(r"times ([\d.]*\d)", FORMULAS[name])


COEFFICIENT = number(r"coefficient ([\d.e-]*\d)", META["tensor_groups"]["aux.*"])
BIASED = {"sigmoid_bias_group_scale", "sqrtsoftplus_bias"}
SCORES = {
    "post_softmax": dict(score="logit", selected_softmax=True),
    "pre_softmax": dict(),
    "sigmoid_bias_group_scale": dict(
        score="sigmoid",
        renormalise=True,
        renormalise_epsilon=1e-20,
        scale=scale_of("sigmoid_bias_group_scale"),
        num_groups=GROUPS,
        groups_per_token=GROUP_TOPK,
        group_score_experts=max(1, K // GROUP_TOPK),
    ),
    "sigmoid_nobias": dict(score="sigmoid", renormalise=True, renormalise_epsilon=1e-20),
    "sqrtsoftplus_bias": dict(score="sqrt_softplus", renormalise=True, renormalise_epsilon=1e-20, scale=scale_of("sqrtsoftplus_bias")),
}


def route(name, logits, ctx):
    return route_logits(logits, ctx, bias=DATA["expert_bias"] if name in BIASED else None, top_k=K, **SCORES[name])


def test_every_tensor_is_replayed():
    groups = {key.split(".")[0] for key in DATA}
    assert groups <= set(SCORES) | {"aux", "drop", "bias_update", "gshard", "logits", "expert_bias"} | OTHERS


@pytest.mark.parametrize("top_k", [1, K])
def test_sinkhorn(top_k):
    # the reference scales exp(logits) in float32
    logits = DATA["logits"].float()
    settings = SinkhornConfig(top_k=top_k, score="sigmoid" if top_k == 1 else "softmax")
    valid = torch.ones(1, logits.shape[0], dtype=torch.bool)
    assert_close(sinkhorn(logits[None], valid, settings.tolerance)[0], DATA["sinkhorn"], kind="golden")
    made = settings.build(1, logits.shape[1], dtype=logits.dtype)
    routing = made.route(logits, context(logits.shape[0]))
    assert torch.equal(routing.expert_TK, DATA["sinkhorn"].topk(top_k, dim=1).indices)
    activated = torch.sigmoid(logits) if top_k == 1 else torch.softmax(logits, dim=1)
    assert_close(routing.weight_TK, activated.gather(1, routing.expert_TK), kind="golden")


def test_base_assignment():
    tokens = DATA["base.assignment"].numel()
    logits = DATA["logits"][:tokens]
    made = BaseConfig(epsilon=1e-3).build(1, logits.shape[1], dtype=logits.dtype)
    routing = made.route(logits, context(tokens))
    assert torch.equal(routing.selected, torch.bincount(DATA["base.assignment"], minlength=logits.shape[1]))
    affinity, best = logits.gather(1, routing.expert_TK), DATA["base.total_affinity"]
    assert best * 0.99 <= affinity.sum() <= best + 1e-9
    assert_close(routing.weight_TK, torch.sigmoid(affinity), kind="golden")


def test_expert_choice():
    logits, expected = DATA["logits"], DATA["expert_choice.token_index"]
    factor = number(r"T\*([\d.]*\d)/E", META["tensor_groups"]["expert_choice.*"])
    made = ExpertChoiceConfig(factor=factor).build(1, logits.shape[1], dtype=logits.dtype)
    selected, weight = dense_map(made.route(logits, context(logits.shape[0])))
    assert torch.equal(selected, torch.zeros_like(selected).scatter(0, expected.T, True))
    assert_close(weight, torch.zeros_like(weight).scatter(0, expected.T, DATA["expert_choice.weight"].T), kind="golden")


@pytest.mark.parametrize("name", SCORES, ids=lambda name: f"{SLUG}-{name}")
def test_score_function(name):
    # the reference computes scores in float32 and stores them as float64
    logits = DATA["logits"].float().requires_grad_()
    selected, weight = dense_map(route(name, logits, context(logits.shape[0])))
    assert torch.equal(selected, DATA[f"{name}.map"].bool())
    assert_close(weight, DATA[f"{name}.probs"], kind="golden")
    cotangent = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
    (weight * cotangent).sum().backward()
    assert_close(logits.grad, DATA[f"{name}.grad_logits"], kind="golden")


def test_sequence_and_micro_batch_losses():
    coefficient, batch = COEFFICIENT, META["B"]
    logits = DATA["logits"].float().requires_grad_()
    ctx = context(logits.shape[0], batch_size=batch)
    routing = route("pre_softmax", logits, ctx)
    sequence = ExpertBalanceConfig(scope="sequence").build()(routing, ctx)
    assert_close(coefficient * sequence, DATA["aux.sequence_loss"], kind="golden")
    whole = coefficient * ExpertBalanceConfig(scope="rank").build()(routing, ctx)
    assert_close(whole, DATA["aux.micro_batch_loss"], kind="golden")
    whole.backward()
    assert_close(logits.grad, DATA["aux.micro_batch_grad_logits"], kind="golden")
    # the reference's z-loss is float64
    z = ZLossConfig().build()(route("pre_softmax", DATA["logits"], ctx), ctx)
    weight = number(r"z_loss: ([\d.e-]*\d)", META["tensor_groups"]["aux.*"])
    assert_close(weight * z, DATA["aux.z_loss"], kind="golden")


class Replayed:
    """Stands for a collective: returns sums over all ranks that were recorded beforehand, in order."""

    def __init__(self, sums=None):
        self.recorded, self.sums = [], iter(sums or [])

    def sum(self, tensor):
        self.recorded.append(tensor)
        return next(self.sums, tensor)


def test_losses_per_rank():
    """The stored global loss keeps P local: the ranks' losses add up to ours, which reduces both f and P."""
    coefficient, ranks = COEFFICIENT, DATA["aux.global_loss_per_rank"].numel()
    halves = DATA["logits"].float().chunk(ranks)
    local = []
    recorded = []
    for logits in halves:
        reducer = Replayed()
        ctx = context(logits.shape[0], reducer=reducer)
        routing = route("pre_softmax", logits, ctx)
        local.append(coefficient * ExpertBalanceConfig(scope="rank").build()(routing, ctx))
        ExpertBalanceConfig(scope="micro_step").build()(routing, ctx)
        recorded.append(reducer.recorded)
    assert_close(torch.stack(local), DATA["aux.local_loss_per_rank"], kind="golden")
    sums = [sum(parts) for parts in zip(*recorded, strict=True)]
    ctx = context(halves[0].shape[0], reducer=Replayed(sums))
    loss = coefficient * ExpertBalanceConfig(scope="micro_step").build()(route("pre_softmax", halves[0], ctx), ctx)
    assert_close(loss, DATA["aux.global_loss_per_rank"].sum(), kind="golden")
    assert_close(loss, DATA["aux.micro_batch_loss"], kind="golden")


@pytest.mark.parametrize("key", sorted(k[: -len(".map")] for k in DATA if k.startswith("drop.") and k.endswith(".map")))
def test_dropping(key):
    _, policy, factor = key.split(".", 2)
    logits = DATA["logits"]
    ctx = context(logits.shape[0])
    routing = route("pre_softmax", logits.float(), ctx)
    priority = {"probs": "probability", "position": "position"}[policy]
    kept = SlotsConfig(factor=float(factor), scope="rank", priority=priority).build()(routing, ctx)
    selected, weight = dense_map(kept)
    expected = DATA[f"{key}.map"].bool()
    assert torch.equal(selected.sum(0), expected.sum(0))
    if policy == "probs":  # the reference's choice among equal positions is not defined
        assert torch.equal(selected, expected)
    else:
        weight = torch.where(expected, dense_map(routing)[1], 0.0)
    assert_close(weight, DATA[f"{key}.probs"], kind="golden")


def test_bias_update():
    counts = DATA["bias_update.tokens_per_expert"].long()
    made = router(
        1,
        counts.numel(),
        torch.float64,
        top_k=K,
        selection_bias=True,
        bias_update_rate=number(r"([\d.e-]*\d)\*sign", META["tensor_groups"]["bias_update.*"]),
    )
    made.selection_bias = DATA["expert_bias"].clone()
    zero = torch.zeros(())
    made.end_step(LayerStatistics(counts, counts, zero, zero))
    assert_close(made.selection_bias, DATA["bias_update.new_bias"], kind="golden")


@pytest.mark.parametrize(
    "case", next(c["cases"] for c in META["cases"] if c["name"] == "gshard"), ids=lambda c: f"{SLUG}-gshard-{c['index']}"
)
def test_gshard(case):
    assert case["second_expert_policy"] == "all"
    key, logits = f"gshard.{case['index']}", DATA["logits"].float()
    tokens, experts = logits.shape
    before = case["normalize_gate_prob_before_dropping"]
    ctx = context(tokens, training=not case["eval_mode"])
    routing = route_logits(logits, ctx, top_k=2, renormalise=before)
    policy = SlotsConfig(
        tokens=2 * math.ceil(tokens / experts),
        scope="rank",
        renormalise=not before,
        priority="first_probability" if case["batch_prioritized_routing"] else "position",
        evaluation_fraction=case["eval_capacity_token_fraction"],
    ).build()
    assert policy.capacity(tokens, 2, experts, training=not case["eval_mode"]) == case["capacity"]
    selected, weight = dense_map(policy(routing, ctx))
    assert torch.equal(selected, DATA[f"{key}.slot"] >= 0)
    assert_close(weight, DATA[f"{key}.combine"], kind="golden")
    loss = SwitchBalanceConfig(scope="rank").build()(routing, context(tokens))
    assert_close(loss, DATA[f"{key}.l_aux"], kind="golden")
