"""Replays the vectors ``evomoe``: the dense-to-sparse gate with recorded noise, its loss, evaluation and schedules."""

import re

import pytest
import torch
from replay import DrawnContext, context, dense_map

from moetrain.moe.losses.balance import GateBalanceConfig
from moetrain.moe.routers.dense_to_sparse import DenseToSparseRouterConfig
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "evomoe"
META, DATA = golden(SLUG)


def router(dtype=torch.float64, **settings):
    settings = dict(decay="constant", threshold=META["threshold"]) | settings
    return DenseToSparseRouterConfig(**settings).build(1, META["E"], dtype=dtype)


@pytest.mark.parametrize("case", META["cases"], ids=lambda case: f"{SLUG}-{case['index']}")
def test_gate(case):
    key, logits = case["index"], DATA["logits"].clone().requires_grad_()
    made = router(
        temperature=case["temperature"],
        hard_after=None if case["soft"] else 0,
        weights="noisy" if case["use_gumbel_gates"] else "clean",
    )
    made.begin_step(0, 1)
    draws = torch.exp(-torch.exp(-DATA[f"{key}.gumbel"]))
    ctx = DrawnContext(context(logits.shape[0]), {"gumbel": draws})
    routing = made.route(logits, ctx)
    gates = dense_map(routing)[1]
    assert_close(gates, DATA[f"{key}.gates"], kind="golden")
    assert routing.expert.numel() == int(DATA[f"{key}.num_selected"])
    loss = GateBalanceConfig(scope="rank").build()(routing, ctx)
    assert_close(loss, DATA[f"{key}.l_aux"], kind="golden")
    weight = float(re.search(r"([\d.]+)\*l_aux", META["tensor_groups"][f"{key}.*"]).group(1))
    cotangent = torch.linspace(-1, 1, gates.numel()).view_as(gates)  # the reference's is float32
    ((gates * cotangent).sum() + weight * loss).backward()
    assert_close(logits.grad, DATA[f"{key}.grad_logits"], kind="golden")


def test_dense_gate_and_evaluation():
    dense = router(evaluation="all").route(DATA["logits"], context(META["T"], training=False))
    assert_close(dense_map(dense)[1], DATA["dense.gates"], kind="golden")
    best = router().route(DATA["logits"], context(META["T"], training=False))
    assert_close(dense_map(best)[1], DATA["eval.gates"], kind="golden")


@pytest.mark.parametrize(("name", "decay"), [("exp", "exponential"), ("linear", "linear")], ids=lambda name: f"{SLUG}-{name}")
def test_schedule(name, decay):
    start, end, length = map(
        float, re.search(r"max ([\d.]+), min ([\d.]+), decay length (\d+)", META["tensor_groups"]["schedule.*"]).groups()
    )
    made = router(temperature=start, final_temperature=end, decay=decay, decay_steps=int(length))
    for step, expected in zip(DATA["schedule.step"].tolist(), DATA[f"schedule.{name}"], strict=True):
        made.begin_step(step, 1)
        assert_close(made.temperature(), expected, kind="golden")


def test_every_tensor_is_replayed():
    parts = ("gates", "grad_logits", "gumbel", "l_aux", "num_selected")
    outputs = {f"{case['index']}.{part}" for case in META["cases"] for part in parts}
    assert set(DATA) == outputs | {"dense.gates", "eval.gates", "logits", "schedule.exp", "schedule.linear", "schedule.step"}
