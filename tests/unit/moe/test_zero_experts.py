"""Zero-computation experts: what each kind contributes, with gradients, and that they are no experts of a rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.config import defaults, load
from moetrain.moe.capacity.policies import DroplessConfig
from moetrain.moe.context import ForwardContext
from moetrain.moe.experts.ffn import FFNExpertsConfig
from moetrain.moe.experts.zero import ZeroExperts, ZeroExpertsConfig
from moetrain.moe.layer import MoELayer, MoEParts
from moetrain.moe.routers.topk import TopKRouterConfig
from moetrain.moe.routing import PAD, Routing, fixed_routing
from moetrain.testing import assert_close

T, D, E = 17, 6, 3
KINDS = ZeroExpertsConfig(num_constant=2, num_copy=2, num_null=2)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make() -> ZeroExperts:
    module = KINDS.build(D, dtype=torch.float64)
    assert module is not None
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    return module


def routing_of(weight: Tensor, seed: int = 1) -> Routing:
    index = draw(T, E + KINDS.count, seed=seed).topk(4, dim=1).indices
    return fixed_routing(index, weight.gather(1, index), num_experts=E, num_columns=E + KINDS.count, valid=torch.arange(T) % 5 != 0).keep(
        torch.arange(4 * T) % 7 != 0
    )


def loop(module: ZeroExperts, x: Tensor, routing: Routing) -> Tensor:
    rows = list((0 * x).unbind())
    for token, expert, weight in zip(routing.token.tolist(), routing.expert.tolist(), routing.weight, strict=True):
        kind = expert - E
        if expert == PAD or kind < 0 or kind >= 4:
            continue
        y = x[token]
        if kind < 2:
            a = torch.softmax(module.mix[kind] @ x[token], dim=0)
            y = a[0] * x[token] + a[1] * module.vector[kind]
        rows[token] = rows[token] + weight * y
    return torch.stack(rows)


def test_equals_the_loop_with_all_gradients() -> None:
    results = []
    for compute in (lambda module, x, routing: module(x, routing), loop):
        module, x, weight = make(), draw(T, D).requires_grad_(), draw(T, E + KINDS.count, seed=2).abs().requires_grad_()
        y = compute(module, x, routing_of(weight))
        (y * draw(T, D, seed=3)).sum().backward()
        results.append({"y": y, "x": x.grad, "weight": weight.grad, "mix": module.mix.grad, "vector": module.vector.grad})
    assert_close(results[0], results[1], "layout")


def test_a_constant_expert_without_preference_is_the_mean_of_input_and_vector() -> None:
    module, x = make(), draw(T, D)
    nn.init.zeros_(module.mix)
    routing = fixed_routing(torch.full((T, 1), E), torch.ones(T, 1, dtype=torch.float64), num_experts=E, num_columns=E + KINDS.count)
    assert_close(module(x, routing), (x + module.vector[0]) / 2, "layout")


def test_copy_returns_its_input_and_null_nothing() -> None:
    module, x = make(), draw(T, D)
    for kind, expected in ((2, x), (5, torch.zeros_like(x))):
        index = torch.full((T, 1), E + kind)
        routing = fixed_routing(index, torch.ones(T, 1, dtype=torch.float64), num_experts=E, num_columns=E + KINDS.count)
        assert_close(module(x, routing), expected, "exact")


def test_null_experts_need_no_module() -> None:
    assert ZeroExpertsConfig(num_null=3).build(D, dtype=torch.float64) is None


def test_a_layer_adds_them_to_its_experts() -> None:
    parts = MoEParts(
        router=TopKRouterConfig(top_k=4, zero_experts=KINDS), experts=FFNExpertsConfig(num_experts=E, width=5), capacity=DroplessConfig()
    )
    layer = parts.build(D, dtype=torch.float64)
    assert isinstance(layer, MoELayer) and layer.zero_experts is not None
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    x, ctx = draw(T, D), ForwardContext(batch_size=1, seq_len=T).at("layers.0")
    routing = layer.router(x, ctx)
    expected = layer.executor(x, routing, layer.experts, ctx) + loop(layer.zero_experts, x, routing)
    assert_close(layer(x, ctx), expected, "layout")
    assert int(routing.selected[E:].sum()) > 0


def test_counts_by_kind_are_settings() -> None:
    assert defaults(TopKRouterConfig)["zero_experts"] == {"num_constant": 0, "num_copy": 0, "num_null": 0}
    config = load(TopKRouterConfig, {"top_k": 1, "zero_experts": {"num_null": 2}})
    assert config.zero_experts == ZeroExpertsConfig(num_null=2)
