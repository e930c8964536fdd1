"""Replays the vectors ``fsmoe-order``: order and inverse order with capacity, as router, slots and local execution."""

import pytest
import torch
from replay import context, dense_map, route_logits

from moetrain.moe.capacity.policies import SlotsConfig
from moetrain.moe.execution import LocalExecutor
from moetrain.moe.experts import Experts
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "fsmoe-order"
META, DATA = golden(SLUG)
PRIORITY = {"probs": "probability", "position": "token"}


class Doubling(Experts):
    """Every expert multiplies its input by 2."""

    def compute(self, x, counts, weights):
        assert int(counts.sum()) == x.shape[0]
        return 2 * x


def policy(case):
    return SlotsConfig(
        factor=case["capacity_factor"], multiple=case["pad_to_pipeline"], scope="rank", priority=PRIORITY[case["drop_policy"]]
    ).build()


@pytest.mark.parametrize("case", META["cases"], ids=lambda case: f"{SLUG}-{case['name']}")
def test_order(case):
    # the reference's softmax passes through float32
    logits, x = DATA["logits"].float().requires_grad_(), DATA["x"].float()
    tokens, experts = logits.shape
    ctx = context(tokens)
    kind = {} if case["softmax_before_topk"] else dict(score="logit", selected_softmax=True)
    routing = route_logits(logits, ctx, top_k=case["k"], **kind)
    assert policy(case).capacity(tokens, case["k"], experts, training=True) == case["capacity"]
    executed = policy(case)(routing, ctx)
    assert torch.equal(routing.selected, DATA[f"{case['name']}.tokens_per_expert"])
    assert_close(dense_map(executed)[1], DATA[f"{case['name']}.combine"], kind="golden")
    out = LocalExecutor()(x, executed, Doubling(experts), ctx)
    assert_close(out, DATA[f"{case['name']}.out"], kind="golden")
    out.sum().backward()
    assert_close(logits.grad, DATA[f"{case['name']}.grad_logits"], kind="golden")


def test_every_tensor_is_replayed():
    outputs = {f"{case['name']}.{part}" for case in META["cases"] for part in ("combine", "tokens_per_expert", "out", "grad_logits")}
    assert set(DATA) == {"logits", "x"} | outputs
