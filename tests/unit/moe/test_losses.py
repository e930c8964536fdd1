"""Auxiliary losses: value at balance, gradients, scopes, padding, and that scores cannot be gamed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetrain.config import load
from moetrain.errors import ConfigError
from moetrain.moe.context import ForwardContext, RouterContext
from moetrain.moe.losses.balance import (
    CommunicationBalanceConfig,
    DeviceBalanceConfig,
    ExpertBalanceConfig,
    SwitchBalanceConfig,
)
from moetrain.moe.losses.z import ZLossConfig
from moetrain.moe.routers.topk import TopKRouter, TopKRouterConfig
from moetrain.moe.routing import Routing, fixed_routing
from moetrain.testing import assert_close

E, K, DEVICES = 8, 2, 4

BALANCE: dict[str, Any] = {
    "switch": SwitchBalanceConfig,
    "expert": ExpertBalanceConfig,
    "per token": lambda **kwargs: ExpertBalanceConfig(normalisation="per_token", **kwargs),
    "unbiased": lambda **kwargs: ExpertBalanceConfig(choices="unbiased", **kwargs),
    "device": lambda **kwargs: DeviceBalanceConfig(num_devices=DEVICES, **kwargs),
    "communication": lambda **kwargs: CommunicationBalanceConfig(num_devices=DEVICES, devices_per_token=K, **kwargs),
}
LOSSES = BALANCE | {"z": lambda **kwargs: ZLossConfig()}


def context(batch: int, seq: int, **kwargs: Any) -> RouterContext:
    return ForwardContext(batch_size=batch, seq_len=seq, training=True, **kwargs).at("layers.0")


def make_router(hidden: int = 5, **kwargs: Any) -> TopKRouter:
    router = TopKRouterConfig(**{"top_k": K, **kwargs}).build(hidden, E, dtype=torch.float64)
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    return router


def random_logits(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def balanced(rounds: int = 1) -> Routing:
    """E tokens per round with equal probabilities; first and second choices each spread evenly, on two devices."""
    token = torch.arange(E * rounds)
    expert = torch.stack([token % E, (token + E // DEVICES) % E], dim=1)
    probs = torch.full((len(token), E), 1 / E, dtype=torch.float64)
    return fixed_routing(expert, probs[:, :K], num_experts=E, logits=torch.zeros_like(probs), probs=probs)


@pytest.mark.parametrize("scope", ["sequence", "micro_step", "rank"])
@pytest.mark.parametrize(("name", "value"), [("switch", 1), ("expert", 1), ("per token", K), ("device", 1), ("communication", 1)])
def test_value_at_perfect_balance(name: str, value: float, scope: str) -> None:
    loss = BALANCE[name](scope=scope).build()
    assert_close(loss(balanced(rounds=3), context(3, E)), torch.tensor(float(value), dtype=torch.float64), "layout")


def test_unbiased_choices_are_the_best_probabilities_whatever_was_selected() -> None:
    logits = random_logits(24)
    biased = make_router(selection_bias=True, score="sigmoid")
    biased.selection_bias.copy_(torch.linspace(-9, 9, E))
    plain = make_router(score="sigmoid")
    ctx = context(2, 12)
    unbiased = ExpertBalanceConfig(choices="unbiased").build()
    assert_close(unbiased(biased.route(logits, ctx), ctx), ExpertBalanceConfig().build()(plain.route(logits, ctx), ctx), "layout")
    selected = ExpertBalanceConfig().build()(biased.route(logits, ctx), ctx)
    assert not torch.isclose(selected, unbiased(biased.route(logits, ctx), ctx))


def test_z_loss_at_zero_logits() -> None:
    assert_close(ZLossConfig().build()(balanced(), context(1, E)), torch.tensor(math.log(E) ** 2, dtype=torch.float64), "layout")


@pytest.mark.parametrize("name", BALANCE)
def test_collapse_costs_more_than_balance(name: str) -> None:
    loss, ctx = BALANCE[name]().build(), context(2, 12)
    logits = 0.1 * random_logits(24)
    slope = torch.linspace(4, -4, E, dtype=torch.float64)
    values = [float(loss(make_router().route(logits + strength * slope, ctx), ctx)) for strength in (0, 0.5, 2)]
    assert values == sorted(values) and values[2] > 1.5 * values[0]


@pytest.mark.parametrize("score", ["sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("shift", [0.0, -20.0, -69.0, -90.0])
@pytest.mark.parametrize("name", ["switch", "expert", "device"])
def test_vanishing_scores_do_not_escape_the_balance_loss(name: str, shift: float, score: str) -> None:
    """A router that sends all tokens to the same experts and pushes every score to 1e-30, in float32."""
    slope = torch.linspace(2, -2, E)
    logits = (slope.repeat(16, 1) + shift).requires_grad_()
    ctx = context(2, 8)
    value = BALANCE[name]().build()(make_router(score=score).route(logits, ctx), ctx)
    assert 1 <= value.item() < math.inf
    value.backward()
    assert float(logits.grad[:, 0].sum()) > 0, "descent must lower the score of the favourite"


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_to_the_router_is_that_of_finite_differences(name: str, score: str) -> None:
    router, loss = make_router(score=score), LOSSES[name]().build()
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value(weight: Tensor) -> Tensor:
        ctx = context(3, 4)
        return loss(router.route(x @ weight.T, ctx), ctx)

    assert torch.autograd.gradcheck(value, (router.weight.detach().clone().requires_grad_(),))
    (gradient,) = torch.autograd.grad(value(router.weight), router.weight)
    assert bool((gradient != 0).any())


@pytest.mark.parametrize("scope", ["sequence", "micro_step"])
@pytest.mark.parametrize("name", BALANCE)
def test_padding_leaves_both_counts_and_probabilities(name: str, scope: str) -> None:
    """Equal to the same sequences without their padding; a sequence of padding alone does not count."""
    loss, router = BALANCE[name](scope=scope).build(), make_router()
    lengths, seq = [5, 3, 0], 5
    logits = random_logits(len(lengths) * seq)
    valid = torch.cat([torch.arange(seq) < length for length in lengths])
    padded, short = logits.clone().requires_grad_(), logits.clone().requires_grad_()

    ctx = context(len(lengths), seq, valid=valid)
    value = loss(router.route(padded, ctx), ctx)
    if scope == "sequence":
        parts = [(short[i * seq : i * seq + n], context(1, n)) for i, n in enumerate(lengths) if n]
        expected = sum(loss(router.route(part, own), own) for part, own in parts) / len(parts)
    else:
        own = context(1, sum(lengths))
        expected = loss(router.route(short[valid], own), own)
    assert_close(value, expected, "layout")
    value.backward()
    expected.backward()
    assert_close(padded.grad, short.grad, "layout")
    assert bool((padded.grad[~valid] == 0).all())


def test_padding_leaves_the_z_loss() -> None:
    logits, valid = random_logits(12), torch.arange(12) % 4 != 3
    ctx, router, loss = context(2, 6, valid=valid), make_router(), ZLossConfig().build()
    short = context(1, int(valid.sum()))
    assert_close(loss(router.route(logits, ctx), ctx), loss(router.route(logits[valid], short), short), "layout")


@pytest.mark.parametrize("name", LOSSES)
def test_only_padding_is_zero_with_a_zero_gradient(name: str) -> None:
    logits = random_logits(8).requires_grad_()
    ctx = context(2, 4, valid=torch.zeros(8, dtype=torch.bool))
    value = LOSSES[name]().build()(make_router().route(logits, ctx), ctx)
    value.backward()
    assert value.item() == 0 and bool((logits.grad == 0).all())


@pytest.mark.parametrize("name", [*BALANCE, "z"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_loss_of_sequence_or_token_scope_is_the_same_for_any_cut_of_the_batch(name: str, padded: bool) -> None:
    loss, router = LOSSES[name]().build(), make_router()
    lengths = [6, 1, 4, 0, 6, 2] if padded else [6] * 6
    valid = torch.cat([torch.arange(6) < length for length in lengths])
    logits = random_logits(36)
    totals = {"token": sum(lengths), "sequence": sum(length > 0 for length in lengths), "micro_step": 1}
    results = []
    for size in (6, 3, 2, 1):
        z = logits.clone().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, 6, size):
            rows = slice(start * 6, (start + size) * 6)
            ctx = context(size, 6, valid=valid[rows] if padded else None, totals=totals)
            total = total + ctx.share(loss.scope) * loss(router.route(z[rows], ctx), ctx)
        total.backward()
        results.append((total.detach(), z.grad))
    for value, gradient in results[1:]:
        assert_close(value, results[0][0], "layout", name="value")
        assert_close(gradient, results[0][1], "layout", name="gradient")


class Ranks:
    """A world in one process: the first pass of each rank records its statistics, the second gets the sums."""

    def __init__(self) -> None:
        self.recorded: list[list[Tensor]] = []
        self.totals: list[Tensor] | None = None
        self.call = 0

    def start_rank(self) -> None:
        self.call = 0
        if self.totals is None:
            self.recorded.append([])

    def sum(self, tensor: Tensor) -> Tensor:
        self.call += 1
        if self.totals is None:
            self.recorded[-1].append(tensor)
            return tensor
        return self.totals[self.call - 1]


@pytest.mark.parametrize("name", BALANCE)
def test_micro_step_scope_is_the_loss_of_the_whole_batch_on_every_rank(name: str) -> None:
    loss, router = BALANCE[name](scope="micro_step").build(), make_router()
    sizes = [3, 1, 2]
    valid = torch.arange(24) % 5 != 0
    logits = random_logits(24)

    whole = logits.clone().requires_grad_()
    ctx = context(6, 4, valid=valid)
    expected = loss(router.route(whole, ctx), ctx)
    expected.backward()

    split, world = logits.clone().requires_grad_(), Ranks()
    rows = torch.arange(24).split([4 * size for size in sizes])

    def on_rank(rank: int) -> Tensor:
        world.start_rank()
        ctx = context(sizes[rank], 4, valid=valid[rows[rank]], reducer=world)
        return loss(router.route(split[rows[rank]], ctx), ctx)

    for rank in range(len(sizes)):
        on_rank(rank)
    world.totals = [torch.stack(tensors).sum(0) for tensors in zip(*world.recorded, strict=True)]
    values = [on_rank(rank) for rank in range(len(sizes))]
    for value in values:
        assert_close(value, expected, "layout", name="value")
    torch.stack(values).mean().backward()  # gradients are averaged over ranks
    assert_close(split.grad, whole.grad, "layout", name="gradient")


def test_rank_scope_and_micro_step_are_the_same_on_one_process() -> None:
    ctx, router = context(3, 8), make_router()
    routing = router.route(random_logits(24), ctx)
    for make in BALANCE.values():
        assert_close(make(scope="rank").build()(routing, ctx), make(scope="micro_step").build()(routing, ctx), "exact")


@pytest.mark.parametrize("padded", [False, True])
def test_groups_of_a_rank_are_like_sequences(padded: bool) -> None:
    valid = torch.arange(24) % 5 != 0 if padded else None
    rows, cut = context(2, 12, valid=valid), context(6, 4, valid=valid)
    router, logits = make_router(), random_logits(24)
    groups = SwitchBalanceConfig(scope="rank", num_groups=6).build()(router.route(logits, rows), rows)
    assert_close(groups, SwitchBalanceConfig().build()(router.route(logits, cut), cut), "layout")


def test_groups_belong_to_the_rank_scope() -> None:
    with pytest.raises(ConfigError, match=r"loss\.balance\.num_groups.*needs loss\.balance\.scope=rank"):
        load(SwitchBalanceConfig, {"num_groups": 2}, path="loss.balance")


def test_one_expert_per_device_is_the_expert_loss() -> None:
    ctx, router = context(3, 8), make_router()
    routing = router.route(random_logits(24), ctx)
    device = DeviceBalanceConfig(num_devices=E).build()(routing, ctx)
    assert_close(device, ExpertBalanceConfig().build()(routing, ctx), "layout")


def test_communication_counts_a_token_once_per_device() -> None:
    probs = torch.full((2, E), 1 / E, dtype=torch.float64)
    expert = torch.tensor([[0, 1], [0, E - 1]])  # one device twice; two devices
    routing = fixed_routing(expert, probs[:, :K], num_experts=E, probs=probs)
    value = CommunicationBalanceConfig(num_devices=DEVICES, devices_per_token=K).build()(routing, context(1, 2))
    sent = torch.tensor([2.0, 0, 0, 1])
    assert float(value) == pytest.approx(float((DEVICES / (K * 2) * sent * (1 / DEVICES)).sum()))


@pytest.mark.parametrize("config", [DeviceBalanceConfig(num_devices=3), CommunicationBalanceConfig(num_devices=3, devices_per_token=1)])
def test_devices_must_divide_the_experts(config: Any) -> None:
    (problem,) = config.check("loss.x", num_experts=E, router=None)
    assert problem.field == "loss.x.num_devices" and "divide the 8 experts" in problem.expected
