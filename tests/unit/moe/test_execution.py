"""Executing routings: equal to a loop over tokens and experts, forward and backward, for every form of routing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetrain.models.common.layers import FeedForward
from moetrain.moe.capacity.policies import DroplessConfig, SlotsConfig
from moetrain.moe.context import ForwardContext
from moetrain.moe.execution import LocalExecutor, sort_entries
from moetrain.moe.experts.ffn import FFNExperts, FFNExpertsConfig
from moetrain.moe.experts.zero import ZeroExpertsConfig
from moetrain.moe.layer import MoELayer, MoEParts
from moetrain.moe.losses.balance import ExpertBalanceConfig
from moetrain.moe.losses.z import ZLossConfig
from moetrain.moe.routers.moduleformer import ModuleFormerRouterConfig
from moetrain.moe.routers.stochastic import StochasticRouterConfig
from moetrain.moe.routers.top_p import TopPRouterConfig
from moetrain.moe.routers.topk import TopKRouterConfig
from moetrain.moe.routing import PAD, Routing, fixed_routing, ragged_routing
from moetrain.ops.activations import ACTIVATIONS
from moetrain.testing import assert_close

T, D, WIDTH, E = 13, 6, 5, 4


def run(x: Tensor, routing: Routing, experts: FFNExperts) -> Tensor:
    y = LocalExecutor()(x, routing, experts, ForwardContext(batch_size=1, seq_len=x.shape[0]).at("layers.0"))
    copies = ZeroExpertsConfig(num_copy=routing.selected.numel() - routing.num_experts).build(D, dtype=x.dtype)
    return y if copies is None else y + copies(x, routing)


def make_experts(num_experts: int = E, *, dtype: torch.dtype = torch.float64, **kwargs: Any) -> FFNExperts:
    experts = FFNExpertsConfig(num_experts=num_experts, width=WIDTH, **kwargs).build(D, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, generator=generator)
    return experts


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expert_output(experts: FFNExperts, expert: int, row: Tensor) -> Tensor:
    act = ACTIVATIONS[experts.config.activation].forward
    hidden = experts.w_in[expert] @ row
    hidden = act(hidden[:WIDTH]) * hidden[WIDTH:] if experts.config.gated else act(hidden)
    return experts.w_out[expert] @ hidden


def loop(x: Tensor, routing: Routing, experts: FFNExperts) -> Tensor:
    """The definition: for each entry, weight times the expert of the token; identity beyond the experts."""
    rows = list((0 * x).unbind())
    for token, expert, weight in zip(routing.token.tolist(), routing.expert.tolist(), routing.weight, strict=True):
        if expert != PAD:
            rows[token] = rows[token] + weight * (x[token] if expert >= experts.num_experts else expert_output(experts, expert, x[token]))
    return torch.stack(rows)


def random_ragged(weight: Tensor, seed: int = 0) -> Routing:
    selected = torch.rand(T, E, generator=torch.Generator().manual_seed(seed)) < 0.4
    selected[3] = False  # a token without experts
    selected[:, 1] = False  # an expert without tokens
    selected[5] = torch.tensor([True, False, True, True])
    return ragged_routing(selected, weight[:, :E], num_experts=E)


def fixed(weight: Tensor, *, valid: Tensor | None = None, columns: int = E) -> Routing:
    index = draw(T, columns, seed=5).topk(2, dim=1).indices
    return fixed_routing(index, weight.gather(1, index), num_experts=E, num_columns=columns, valid=valid)


ROUTINGS: dict[str, Any] = {
    "ragged": random_ragged,
    "ragged, dropped": lambda w: (r := random_ragged(w, seed=1)).keep(torch.arange(r.token.numel()) % 3 != 0),
    "fixed": fixed,
    "padded": lambda w: fixed(w, valid=torch.arange(T) % 4 != 0),
    "dropped": lambda w: fixed(w).keep(torch.arange(2 * T) % 3 != 0),
    "identity experts": lambda w: fixed(w, columns=E + 2),
    "identity experts, dropped": lambda w: fixed(w, columns=E + 2).keep(torch.arange(2 * T) % 5 != 0),
    "nothing left": lambda w: fixed(w).keep(torch.zeros(2 * T, dtype=torch.bool)),
    "no entries": lambda w: ragged_routing(torch.zeros(T, E, dtype=torch.bool), w[:, :E], num_experts=E),
    "all experts": lambda w: fixed_routing(torch.arange(E).expand(T, E), w[:, :E], num_experts=E),
}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ROUTINGS)
def test_equals_the_loop_with_all_gradients(name: str, gated: bool) -> None:
    results = []
    for execute in (lambda *a: run(*a), loop):
        experts = make_experts(gated=gated, activation="silu" if gated else "gelu")
        x, weight = draw(T, D).requires_grad_(), draw(T, E + 2, seed=1).abs().requires_grad_()
        y = execute(x, ROUTINGS[name](weight), experts)
        (y * draw(T, D, seed=2)).sum().backward()
        zero = lambda t: torch.zeros_like(t) if t.grad is None else t.grad  # noqa: E731
        results.append({"y": y, "x": zero(x), "weight": zero(weight), "w_in": zero(experts.w_in), "w_out": zero(experts.w_out)})
    assert_close(results[0], results[1], "layout", name=name)


@pytest.mark.parametrize("num_experts", [1, 255, 256, 257, 300])
def test_any_number_of_experts(num_experts: int) -> None:
    """The sort key narrows with the number of experts."""
    experts, x = make_experts(num_experts), draw(T, D)
    index = torch.randint(num_experts, (T, 1), generator=torch.Generator().manual_seed(0))
    index[0] = num_experts - 1
    routing = fixed_routing(index, torch.ones(T, 1, dtype=torch.float64), num_experts=num_experts)
    assert_close(run(x, routing, experts), loop(x, routing, experts), "layout")


def test_sorting_by_expert_or_by_a_given_order_of_places() -> None:
    routing = fixed_routing(torch.tensor([[2, 0], [1, 2], [0, 2]]), torch.arange(6.0).view(3, 2), num_experts=3)
    order = sort_entries(routing)
    assert order.counts.tolist() == [2, 1, 3]
    assert order.rows.token.tolist() == [0, 2, 1, 0, 1, 2] and routing.weight[order.entry].tolist() == [1, 4, 2, 0, 3, 5]
    assert order.rows.place.tolist() == [3, 0, 2, 4, 1, 5] and order.rows.bounds is None
    # experts 2, 0, 1 in this order
    moved = sort_entries(routing, torch.tensor([1, 2, 0]))
    assert moved.counts.tolist() == [3, 2, 1] and moved.rows.token.tolist() == [0, 1, 2, 0, 2, 1]
    dropped = sort_entries(routing.keep(torch.tensor([True, False, True, True, True, True])), torch.tensor([1, 2, 0]))
    assert dropped.counts.tolist() == [3, 1, 1] and dropped.rows.bounds.tolist() == [0, 1, 3, 5]


@pytest.mark.parametrize("name", ["ragged", "fixed", "dropped"])
def test_renaming_the_experts_changes_nothing(name: str) -> None:
    experts, renamed, x = make_experts(), make_experts(), draw(T, D)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        renamed.w_in.copy_(experts.w_in[order])
        renamed.w_out.copy_(experts.w_out[order])
    routing = ROUTINGS[name](draw(T, E, seed=1))
    new_id = torch.cat([order.argsort(), torch.tensor([PAD])])
    moved = Routing(**{**vars(routing), "expert": new_id[routing.expert]})
    assert_close(run(x, moved, renamed), run(x, routing, experts), "layout")


@pytest.mark.parametrize("gated", [True, False])
def test_one_dropless_expert_with_weight_one_is_the_dense_feed_forward(gated: bool) -> None:
    layer = make_layer(num_experts=1, top_k=1, gated=gated)
    dense = FeedForward(D, WIDTH, gated=gated, dtype=torch.float64)
    with torch.no_grad():
        parts = layer.experts.w_in[0].split(WIDTH)
        if gated:
            dense.w_gate.weight.copy_(parts[0])
        dense.w_up.weight.copy_(parts[-1])
        dense.w_down.weight.copy_(layer.experts.w_out[0])
    x = draw(2, 5, D)
    assert_close(layer(x, ForwardContext(batch_size=2, seq_len=5).at("layers.0")), dense(x), "layout")


def make_layer(*, num_experts: int = E, top_k: int = 2, gated: bool = True, shared: nn.Module | None = None, **parts: Any) -> MoELayer:
    defaults: dict[str, Any] = {"capacity": DroplessConfig(), "router": TopKRouterConfig(top_k=top_k)}
    layer = MoEParts(experts=FFNExpertsConfig(num_experts=num_experts, width=WIDTH, gated=gated), **(defaults | parts)).build(
        D, dtype=torch.float64, shared=shared
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    return layer


def test_a_layer_is_router_capacity_experts_and_shared_expert() -> None:
    layer = make_layer(shared=FeedForward(D, 3, dtype=torch.float64), capacity=SlotsConfig(tokens=2))
    x = draw(2, 5, D)
    ctx = ForwardContext(batch_size=2, seq_len=5, training=True).at("layers.0")
    routing = layer.router(x.flatten(0, 1), ctx)
    executed = layer.capacity(routing, ctx)
    assert int(routing.selected.sum()) > int(executed.dispatched.sum())
    expected = loop(x.flatten(0, 1), executed, layer.experts).view_as(x) + layer.shared(x)
    assert_close(layer(x, ctx), expected, "layout")


def test_a_layer_records_statistics_of_valid_tokens_and_weighted_losses_only_in_training() -> None:
    losses = {"balance": ExpertBalanceConfig(coefficient=0.5), "z": ZLossConfig(coefficient=0.25)}
    layer, x = make_layer(loss=losses), draw(2, 5, D)
    valid = torch.arange(10) < 7
    ctx = ForwardContext(batch_size=2, seq_len=5, training=True, valid=valid)
    layer(x, ctx.at("layers.0"))
    routing = layer.router(x.flatten(0, 1), ctx.at("other"))
    seen = ctx.statistics["layers.0.ffn"]
    assert int(seen.tokens) == 7 and int(seen.selected.sum()) == 14 and torch.equal(seen.selected, seen.dispatched)
    assert_close(seen.entropy, torch.special.entr(routing.probs[valid]).sum(), "layout")
    assert_close(ctx.losses["balance"], 0.5 * layer.losses["balance"](routing, ctx.at("other")), "layout")
    assert_close(ctx.losses["z"], 0.25 * layer.losses["z"](routing, ctx.at("other")), "layout")

    evaluation = ForwardContext(batch_size=2, seq_len=5)
    layer(x, evaluation.at("layers.0"))
    assert not evaluation.losses and int(evaluation.statistics["layers.0.ffn"].tokens) == 10


def test_an_auxiliary_loss_reaches_the_router_but_not_the_experts() -> None:
    layer = make_layer(loss={"balance": ExpertBalanceConfig()})
    ctx = ForwardContext(batch_size=2, seq_len=5, training=True)
    layer(draw(2, 5, D), ctx.at("layers.0"))
    ctx.losses["balance"].backward()
    assert bool((layer.router.weight.grad != 0).any()) and layer.experts.w_in.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_has_the_inputs_dtype_and_weights_are_float32(dtype: torch.dtype) -> None:
    experts = make_experts(dtype=torch.float32)
    weight = draw(T, E, seed=1).abs().float()
    x = draw(T, D).to(dtype)
    y = run(x, fixed(weight), experts)
    expected = run(x.double(), fixed(weight.double()), experts.double())
    assert y.dtype == dtype
    assert_close(y, expected.to(dtype), "layout")


SUM_TO_ONE = {
    "stochastic": lambda experts: StochasticRouterConfig(granularity="token"),
    "moduleformer": lambda experts: ModuleFormerRouterConfig(top_k=experts, gate_size=3),
    "top_p": lambda experts: TopPRouterConfig(threshold=1.0),
    "smoe_dropout": lambda experts: TopKRouterConfig(top_k=min(2, experts), score="logit", selected_softmax=True, trained=False),
}


@pytest.mark.parametrize("num_experts", [1, E])
@pytest.mark.parametrize("router", SUM_TO_ONE)
def test_equal_experts_with_weights_that_sum_to_one_are_a_dense_layer(router: str, num_experts: int) -> None:
    parts = MoEParts(
        router=SUM_TO_ONE[router](num_experts),
        experts=FFNExpertsConfig(num_experts=num_experts, width=WIDTH),
        capacity=DroplessConfig(),
    )
    layer, dense = parts.build(D, dtype=torch.float64), FeedForward(D, WIDTH, dtype=torch.float64)
    for tensor in (*layer.router.parameters(), *layer.router.buffers(), *dense.parameters()):
        nn.init.normal_(tensor, generator=torch.Generator().manual_seed(tensor.numel()))
    assert dense.w_gate is not None
    one = {"w_in": torch.cat([dense.w_gate.weight, dense.w_up.weight]), "w_out": dense.w_down.weight}
    layer.experts.load_state_dict({name: weight.expand(num_experts, -1, -1) for name, weight in one.items()})
    ctx = ForwardContext(batch_size=1, seq_len=T, training=True).at("layers.0")
    assert_close(layer(draw(T, D), ctx), dense(draw(T, D)), "layout")


def test_logical_tensors_name_every_row_of_the_stack_once() -> None:
    experts = make_experts(gated=True)
    names = [name for name, *_ in experts.logical()]
    assert names[:3] == ["0.w_gate", "0.w_up", "0.w_down"] and len(set(names)) == 3 * E
    covered = sum((tensor.stop - tensor.start) * getattr(experts, parameter).shape[2] for _, parameter, _, tensor in experts.logical())
    assert covered == sum(p.numel() for p in experts.parameters())
    experts.hold([3, 1])
    assert [name for name, *_ in experts.logical()][::3] == ["3.w_gate", "1.w_gate"] and experts.w_in.shape[0] == 2


@pytest.mark.parametrize("gated", [True, False])
def test_parts_of_experts_sum_to_the_experts(gated: bool) -> None:
    """Every logical tensor is cut along the dim that it declares."""
    whole, x, counts = make_experts(gated=gated), draw(7, D), torch.tensor([3, 0, 2, 2])
    total = torch.zeros(7, D, dtype=torch.float64)
    for part in range(WIDTH):
        experts = make_experts(gated=gated)
        experts.split(WIDTH)
        pairs = zip(experts.logical(), whole.logical(), strict=True)
        for (name, parameter, row, mine), (full_name, _, _, full) in pairs:
            assert name == full_name
            value = getattr(whole, parameter)[row, full.start : full.stop].chunk(WIDTH, dim=mine.split_dim)[part]
            getattr(experts, parameter).data[row, mine.start : mine.stop] = value
        total += experts.compute(x, counts, experts.weights())
    assert_close(total, whole.compute(x, counts, whole.weights()), kind="fast_path")
