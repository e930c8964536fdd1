"""Mutual-information balance and load concentration: bounds, gradients, scopes; ModuleFormer's explored choices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetrain.config import load
from moetrain.errors import ConfigError
from moetrain.moe.context import ForwardContext, RouterContext
from moetrain.moe.losses.information import LoadConcentrationConfig, MutualInformationConfig
from moetrain.moe.routers.moduleformer import ModuleFormerRouter, ModuleFormerRouterConfig
from moetrain.moe.routing import Routing, fixed_routing
from moetrain.testing import assert_close

D, E, K, B, S = 6, 8, 3, 4, 5
LOSSES = [MutualInformationConfig, LoadConcentrationConfig]


def context(batch: int = B, seq: int = S, **kwargs: Any) -> RouterContext:
    return ForwardContext(**{"batch_size": batch, "seq_len": seq, "training": True, **kwargs}).at("layers.0")


def routed(logits: Tensor) -> Routing:
    probs = torch.softmax(logits, dim=1)
    index = probs.detach().topk(K, dim=1).indices
    return fixed_routing(index, probs.gather(1, index), num_experts=E, logits=logits, probs=probs)


def random_logits(tokens: int = B * S, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(tokens, E, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def value(config: Any, logits: Tensor, ctx: RouterContext | None = None, **settings: Any) -> Tensor:
    return config(**settings).build()(routed(logits), ctx or context(1, logits.shape[0]))


def test_values_at_the_extremes() -> None:
    certain = 1000 * torch.eye(E, dtype=torch.float64)
    same = random_logits(1).expand(E, E)
    assert abs(value(MutualInformationConfig, certain).item() + math.log(E)) < 1e-6
    assert abs(value(MutualInformationConfig, same).item()) < 1e-6
    assert abs(value(LoadConcentrationConfig, certain).item() - math.log(E)) < 1e-6
    assert abs(value(LoadConcentrationConfig, certain[:1].expand(E, E)).item()) < 1e-6
    for scale in (0.1, 1.0, 10.0):
        assert -math.log(E) <= value(MutualInformationConfig, random_logits(scale=scale)).item() <= 0


@pytest.mark.parametrize("scope", ["sequence", "micro_step"])
@pytest.mark.parametrize("config", LOSSES)
def test_gradient_is_that_of_finite_differences(config: Any, scope: str) -> None:
    valid = torch.arange(B * S) % S < 3
    assert torch.autograd.gradcheck(lambda z: value(config, z, context(valid=valid), scope=scope), (random_logits().requires_grad_(),))


@pytest.mark.parametrize("config", LOSSES)
def test_probabilities_that_underflow_have_finite_gradients(config: Any) -> None:
    logits = random_logits(scale=1e4).requires_grad_()
    value(config, logits).backward()
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("config", LOSSES)
def test_sequence_scope_is_the_mean_over_sequences_and_another_objective(config: Any) -> None:
    logits = random_logits()
    parts = torch.stack([value(config, part) for part in logits.chunk(B)])
    assert_close(value(config, logits, context(), scope="sequence"), parts.mean(), "layout")
    assert not torch.isclose(value(config, logits, context()), parts.mean())


def make(**settings: Any) -> ModuleFormerRouter:
    router = ModuleFormerRouterConfig(**{"top_k": K, "gate_size": 7, **settings}).build(D, E, dtype=torch.float64)
    for name, parameter in router.named_parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return router


@pytest.mark.parametrize("gate", ["mlp", "cosine"])
def test_explored_experts_are_others_than_the_best_and_keep_their_probability(gate: Any) -> None:
    x, tokens = torch.randn(1, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64), 4000
    router = make(gate=gate, explored=1)
    routing = router(x.expand(tokens, D), context(40, 100))
    probs = routing.probs[0].detach()
    best = probs.topk(K - 1).indices
    assert bool((routing.expert_TK[:, :-1] == best).all())
    assert_close(routing.weight_TK, routing.probs.gather(1, routing.expert_TK), "exact")
    drawn = torch.bincount(routing.expert_TK[:, -1], minlength=E).double() / tokens
    others = probs.index_fill(0, best, 0)
    assert (drawn - others / others.sum()).abs().max() < 0.04  # five deviations
    evaluated = router(x, context(1, 1, training=False))
    assert torch.equal(evaluated.expert, probs.topk(K).indices)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"explored": 3}, "must be <= router.top_k"), ({"logit_bias": True}, "logit_bias"), ({"explored": 1, "score": "sigmoid"}, "score")],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(ModuleFormerRouterConfig, {"top_k": 2, **settings}, path="router")
