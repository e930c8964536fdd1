"""Replays the vectors ``deepspeed-gates``: top-1, top-2 and top-k gates with their drops, as router x capacity x loss."""

import pytest
import torch
from replay import DrawnContext, context, place_map, route_logits

from moetrain.moe.capacity.policies import DroplessConfig, SlotsConfig
from moetrain.moe.losses.balance import ExpertBalanceConfig, SwitchBalanceConfig
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "deepspeed-gates"
META, DATA = golden(SLUG)
AUX_WEIGHT = 2.0  # of the stored gradients
IN_ORDER = SlotsConfig(scope="rank", priority="token").build()


def router_settings(case):
    settings = dict(top_k={"top1gating": 1, "top2gating": 2}.get(case["function"]) or case["k"])
    if case.get("noisy_gate_policy") == "RSample":
        settings["sampling"] = "all"
    if case.get("top2_2nd_expert_sampling"):
        settings["sampling"] = "later"
    # without drops there is no capacity policy that could renormalise after them
    return settings | dict(renormalise=settings["top_k"] > 1 and not case["drop_tokens"])


def capacity(case):
    if not case["drop_tokens"]:
        return DroplessConfig().build()
    priority = {
        "top1gating": "random" if case.get("use_rts") else "token",
        "top2gating": "position",
        "topkgating": {"probs": "probability", "position": "token"}.get(case.get("drop_policy")),
    }[case["function"]]
    return SlotsConfig(
        factor=case["capacity_factor"],
        minimum=case["min_capacity"],
        scope="rank",
        priority=priority,
        renormalise=case["function"] != "top1gating",
    ).build()


def places(case, routing, executed, ctx):
    """Where the reference puts an entry: top-2 counts dropped choices and serves first choices first; the others fill
    up the buffer in token order with what they keep."""
    if case["function"] == "top2gating":
        return SlotsConfig(scope="rank", priority="position").build().places(routing, ctx, group_size=routing.num_tokens)
    return IN_ORDER.places(executed, ctx, group_size=routing.num_tokens)


def replay(case):
    logits = DATA["logits"].clone().requires_grad_()
    tokens = logits.shape[0]
    uniform = torch.exp(-torch.exp(-DATA["gumbel"].double()))
    draws = {"sampling": uniform, "random_token_selection": DATA["rts_uniform"]}
    valid = DATA["used_token"].bool() if case.get("used_token") else None
    ctx = DrawnContext(context(tokens, valid=valid), draws)
    routing = route_logits(logits, ctx, **router_settings(case))
    return logits, routing, capacity(case)(routing, ctx), ctx


def is_defined(case):
    """Without random token selection the reference's top-1 gate drops by how its top-k breaks ties."""
    return case.get("use_rts", True) or case["capacity"] >= int(DATA[f"{case['name']}.exp_counts"].max())


def by_case(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: f"{SLUG}-{case['name']}")


@by_case([case for case in META["cases"] if is_defined(case)])
def test_gate(case):
    name = case["name"]
    logits, routing, executed, ctx = replay(case)
    tokens, experts = logits.shape
    assert torch.equal(routing.selected, DATA[f"{name}.exp_counts"])
    if case["drop_tokens"]:
        assert capacity(case).capacity(tokens, routing.top_k, experts, training=True) == case["capacity"]
    else:
        assert int(routing.selected.max()) == case["capacity"]
    combine = place_map(executed, places(case, routing, executed, ctx), case["capacity"])
    assert_close(combine, DATA[f"{name}.combine"], kind="golden")

    loss = (ExpertBalanceConfig if case["function"] == "topkgating" else SwitchBalanceConfig)(scope="rank").build()
    # the reference's means are over all rows, also those that take no part, so its loss is ours without the mask
    aux = loss(routing, context(tokens))
    assert_close(aux.view(1), DATA[f"{name}.l_aux"], kind="golden")
    cotangent = torch.linspace(-1, 1, combine.numel()).view_as(combine)
    ((combine * cotangent).sum() + AUX_WEIGHT * aux).backward()
    assert_close(logits.grad, DATA[f"{name}.grad_logits"], kind="golden")


@by_case(META["cases"])
def test_an_expert_keeps_as_many_as_it_has_slots(case):
    _, routing, executed, _ = replay(case)
    stored = (DATA[f"{case['name']}.combine"] > 0).sum(dim=(0, 2))
    assert torch.equal(executed.dispatched, routing.selected.clamp_max(case["capacity"])) and torch.equal(executed.dispatched, stored)


def test_every_tensor_is_replayed():
    inputs = {"logits", "rts_uniform", "gumbel", "used_token"}
    outputs = {f"{case['name']}.{part}" for case in META["cases"] for part in ("l_aux", "combine", "exp_counts", "grad_logits")}
    assert set(DATA) == inputs | outputs
