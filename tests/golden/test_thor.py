"""Replays the vectors ``thor``: the objective of two passes with gradients, and a layer of experts under given draws."""

import re

import pytest
import torch
from replay import DrawnContext, append_one, biased_experts, context

from moetrain.models.common.vocabulary import WholeVocabulary
from moetrain.moe.capacity.policies import DroplessConfig
from moetrain.moe.context import ForwardContext
from moetrain.moe.layer import MoELayer
from moetrain.moe.routers.stochastic import StochasticRouterConfig
from moetrain.objectives.batch import IGNORE, Batch
from moetrain.objectives.consistency import ConsistencyConfig
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "thor"
META, DATA = golden(SLUG)


class TwoPasses:
    """A model that answers with recorded logits."""

    vocabulary = WholeVocabulary()

    def __init__(self, *logits):
        self.logits = logits

    def __call__(self, tokens, ctx, document=None):
        return torch.cat(self.logits)


def test_objective():
    halves = [DATA[name].clone().requires_grad_() for name in ("logits1", "logits2")]
    targets = torch.where(DATA["pad_mask"].bool(), IGNORE, DATA["target"])
    batch = Batch(targets, targets, torch.arange(META["B"]))
    ctx = ForwardContext(batch_size=META["B"], seq_len=META["S"], training=True)
    terms = ConsistencyConfig(alpha=META["alpha"]).build()(TwoPasses(*halves), batch, ctx)
    assert_close(terms.extra["consistency"] / META["alpha"], DATA["consistency"], kind="golden")
    total = terms.main + sum(terms.extra.values())
    # the reference's divergence is float32, whose error the total and the gradients keep
    assert_close(total.float(), DATA["total"].float(), kind="golden")
    total.backward()
    for half, expected in zip(halves, ("grad_logits1", "grad_logits2"), strict=True):
        assert_close(half.grad.float(), DATA[expected].float(), kind="golden")


def outputs(x, draws=None, **settings):
    """Outputs of the layer for x [..., D]."""
    tokens, experts = x[..., 0].numel(), META["E"]
    layer = MoELayer(
        router=StochasticRouterConfig(**settings).build(x.shape[-1], experts, dtype=x.dtype),
        capacity=DroplessConfig().build(),
        experts=biased_experts(*(DATA[f"layer.{name}"] for name in ("w1", "b1", "w2", "b2"))),
        losses={},
    )
    ctx = context(tokens, training=draws is not None)
    if draws is not None:
        ctx = DrawnContext(ctx, {"expert": (draws.view(-1, 1) + 0.5) / experts})
    return layer(append_one(x), ctx)[..., :-1]


@pytest.mark.parametrize("expert", range(META["E"]), ids=lambda expert: f"{SLUG}-{expert}")
def test_one_expert_for_all(expert):
    x = DATA["layer.x"]
    y = outputs(x, torch.full(x.shape[:-1], expert), granularity="pass")
    assert_close(y, DATA["layer.expert_outputs"][expert], kind="golden")


def test_token_level_and_ensemble():
    x = DATA["layer.x"]
    assert_close(outputs(x, DATA["layer.token_choice"], granularity="token"), DATA["layer.y_token_level"], kind="golden")
    assert_close(outputs(x, evaluation="ensemble"), DATA["layer.y_ensemble"], kind="golden")


def test_every_tensor_is_replayed():
    layer = {name for name in DATA if re.match(r"layer\.", name)}
    assert layer == {f"layer.{n}" for n in ("x", "w1", "b1", "w2", "b2", "expert_outputs", "token_choice", "y_ensemble", "y_token_level")}
    objective = {"logits1", "logits2", "target", "pad_mask", "consistency", "total", "grad_logits1", "grad_logits2"}
    assert set(DATA) - layer == objective
