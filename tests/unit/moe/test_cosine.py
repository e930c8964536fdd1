"""The cosine router: what its logits depend on, and how it starts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from moetrain.config import load
from moetrain.errors import ConfigError
from moetrain.moe.context import ForwardContext
from moetrain.moe.routers.cosine import MAX_SCALE, CosineTopKRouter, CosineTopKRouterConfig
from moetrain.parallel.parallelize import find_init
from moetrain.testing import assert_close
from moetrain.testing.scenarios import SCENARIOS

T, D, P, E, K = 30, 7, 4, 6, 2


def make(dtype: torch.dtype = torch.float64, scale: float = 2.0) -> CosineTopKRouter:
    router = CosineTopKRouterConfig(top_k=K, projection_size=P).build(D, E, dtype=dtype)
    for parameter in router.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    nn.init.constant_(router.log_scale, math.log(scale))
    return router


def inputs() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def test_logits_are_scaled_cosines() -> None:
    router = make()
    token = inputs() @ router.projection.T + router.projection_bias
    expected = 2 * nn.functional.cosine_similarity(token[:, None], router.weight[None], dim=2)
    assert_close(router.logits(inputs()), expected, "layout")
    assert float(expected.detach().abs().max()) <= 2


def test_lengths_of_embeddings_and_tokens_do_not_matter() -> None:
    router = make()
    before = router.logits(inputs())
    with torch.no_grad():
        router.weight.mul_(torch.arange(1, E + 1)[:, None])
        router.projection.mul_(3)
        router.projection_bias.mul_(3)
    assert_close(router.logits(inputs()), before, "layout")


def test_the_scale_is_learned_up_to_its_bound() -> None:
    for scale, learns in ((50.0, True), (1e4, False)):
        router = make(scale=scale)
        routing = router(inputs(), ForwardContext(batch_size=1, seq_len=T, training=True).at("layers.0"))
        assert float(routing.logits.detach().abs().max()) <= min(scale, MAX_SCALE)
        routing.weight.sum().backward()
        assert bool(router.log_scale.grad != 0) == learns


def test_half_precision_inputs_are_compared_in_float32() -> None:
    assert make(torch.float32).logits(inputs().bfloat16()).dtype == torch.float32


def test_settings_of_its_own_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"router\.logit_bias.*cosines have no bias"):
        load(CosineTopKRouterConfig, {"top_k": 2, "logit_bias": True}, path="router")
    with pytest.raises(ConfigError, match=r"router\.temperature = 0\.001"):
        load(CosineTopKRouterConfig, {"top_k": 2, "temperature": 0.001}, path="router")


def test_a_model_starts_it_at_its_temperature_and_the_rest_as_usual() -> None:
    scenario = SCENARIOS["noisy_gates"]
    with torch.device("meta"):
        model = scenario.model.build(scenario.parts, vocab_size=scenario.vocab_size, dtype=torch.float64)
    name = next(iter(model.moe_layers()))
    start = {parameter: find_init(model, f"{name}.router.{parameter}") for parameter in ("log_scale", "projection_bias", "projection")}
    temperature = scenario.parts.router.temperature
    assert start["log_scale"].value == -math.log(temperature) and start["projection_bias"].value == 0
    assert start["projection"] == find_init(model, f"{name}.router.weight") == find_init(model, f"{name}.experts.3.w_up")
