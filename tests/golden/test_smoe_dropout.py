"""Replays the vectors ``smoe-dropout``: the frozen random gate at several k, schedules of k, the baseline's balance loss."""

import pytest
import torch
from replay import context

from moetrain.models.common.vocabulary import WholeVocabulary
from moetrain.moe.losses.balance import ExpertBalanceConfig
from moetrain.moe.routers.topk import TopKRouterConfig
from moetrain.moe.schedules import scheduled_top_k
from moetrain.objectives.consistency import symmetric_divergence
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "smoe-dropout"
META, DATA = golden(SLUG)
TOP_KS = sorted(int(key[1:].split(".")[0]) for key in DATA if key.startswith("k") and key.endswith(".indices"))
SCHEDULES = sorted(key.removeprefix("schedule.") for key in DATA if key.startswith("schedule.") and key != "schedule.step")


@pytest.fixture
def gate():
    weight = DATA["gate.weight"]
    config = TopKRouterConfig(top_k=META["k_max"], score="logit", selected_softmax=True, logit_bias=True, trained=False)
    made = config.build(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    made.weight.copy_(weight)
    made.bias.copy_(DATA["gate.bias"])
    return made


@pytest.mark.parametrize("top_k", TOP_KS, ids=lambda k: f"{SLUG}-k{k}")
def test_gate(gate, top_k):
    gate.top_k = top_k
    ctx = context(DATA["x"].shape[0])
    routing = gate(DATA["x"], ctx)
    assert torch.equal(routing.expert_TK, DATA[f"k{top_k}.indices"])
    assert_close(routing.weight_TK, DATA[f"k{top_k}.weights"], kind="golden")
    # the reference divides the probabilities by all T * k choices, as it does the counts; the counting is float32
    balance = ExpertBalanceConfig(scope="rank").build()(routing, ctx) / top_k
    assert_close(balance.float(), DATA[f"k{top_k}.balance_loss"].float(), kind="golden")


@pytest.mark.parametrize("name", SCHEDULES, ids=lambda name: f"{SLUG}-{name}")
def test_schedule(name):
    shape, direction = name.split("_")
    ends = (META["k_min"], META["k_max"])
    start, end = ends if direction == "increase" else ends[::-1]
    kind = {"exp": "exponential"}.get(shape, shape)
    made = [scheduled_top_k(start, end, step, META["steps"], kind) for step in DATA["schedule.step"].tolist()]
    assert made == DATA[f"schedule.{name}"].tolist()


def test_consistency_of_its_thor_baseline():
    """The mean over classes of both divergences, where ours is half their sum."""
    a, b = DATA["thor_kl.a"], DATA["thor_kl.b"]
    divergence = symmetric_divergence(a, b, WholeVocabulary())
    assert_close(2 * divergence / a.shape[1], DATA["thor_kl.loss"], kind="golden")


def test_every_tensor_is_replayed():
    replayed = {"gate", "x", "schedule", "thor_kl"} | {f"k{top_k}" for top_k in TOP_KS}
    assert {key.split(".")[0] for key in DATA} == replayed
