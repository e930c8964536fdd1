"""The forward context: decisions made once, noise without state, shares of the global mean, recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetrain.models.common.decoder import Decoder
from moetrain.models.deepseek_moe import DeepSeekMoEConfig
from moetrain.moe.capacity.policies import SlotsConfig
from moetrain.moe.context import ForwardContext
from moetrain.moe.experts.ffn import FFNExpertsConfig
from moetrain.moe.layer import MoEParts
from moetrain.moe.losses.balance import ExpertBalanceConfig
from moetrain.moe.losses.z import ZLossConfig
from moetrain.moe.routers.topk import TopKRouterConfig
from moetrain.testing import assert_close


def context(batch: int = 4, seq: int = 6, **kwargs: Any) -> ForwardContext:
    return ForwardContext(batch_size=batch, seq_len=seq, **kwargs)


def test_a_decision_is_replayed_in_the_recomputed_pass_and_only_there() -> None:
    ctx, calls = context(), []

    def decide() -> int:
        calls.append(torch.is_grad_enabled())
        return len(calls)

    layer = ctx.at("layers.1")
    assert layer.once("select", decide) == 1
    assert layer.once("other", decide) == 2 and ctx.at("layers.2").once("select", decide) == 3
    assert layer.once("select", decide) == 4, "a second pass decides again"
    ctx.recomputing = True
    assert layer.once("select", decide) == 4 and ctx.at("layers.2").once("select", decide) == 3
    assert calls == [False] * 4, "decisions carry no gradient"
    with pytest.raises(KeyError):
        layer.once("never asked", decide)


def test_noise_does_not_depend_on_how_the_batch_is_cut() -> None:
    sample = torch.tensor([17, 3, 99, 4])
    whole = context(sample=sample, seed=1, step=5).at("layers.0").uniform("jitter", 3)
    assert whole.shape == (24, 3)
    for rows in ([0, 1], [2], [3, 1, 0]):
        part = context(batch=len(rows), sample=sample[rows], seed=1, step=5).at("layers.0").uniform("jitter", 3)
        assert torch.equal(part.view(len(rows), 6, 3), whole.view(4, 6, 3)[rows])
    shorter = context(sample=sample, seq=4, seed=1, step=5).at("layers.0").uniform("jitter", 3)
    assert torch.equal(shorter.view(4, 4, 3), whole.view(4, 6, 3)[:, :4])


def test_noise_differs_in_every_coordinate() -> None:
    base = context(seed=1, step=5).at("layers.0").uniform("jitter", 3)
    others = [
        context(seed=2, step=5).at("layers.0").uniform("jitter", 3),
        context(seed=1, step=6).at("layers.0").uniform("jitter", 3),
        context(seed=1, step=5, pass_id=1).at("layers.0").uniform("jitter", 3),
        context(seed=1, step=5).at("layers.1").uniform("jitter", 3),
        context(seed=1, step=5).at("layers.0", "attn").uniform("jitter", 3),
        context(seed=1, step=5).at("layers.0").uniform("drop", 3),
        context(seed=1, step=5, sample=torch.arange(4) + 4).at("layers.0").uniform("jitter", 3),
    ]
    assert all(bool((base != other).all()) for other in others)
    assert len(base.unique()) == base.numel()
    assert torch.equal(base, context(seed=1, step=5).at("layers.0").uniform("jitter", 3))


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_shares_of_all_parts_of_a_step_sum_to_the_number_of_ranks(scope: str) -> None:
    """Averaged over ranks, the weights of the local means then sum to one."""
    lengths, world = [6, 2, 0, 5, 1, 6, 0, 0], 2
    totals = {"token": sum(lengths), "sequence": sum(n > 0 for n in lengths), "micro_step": 2}
    shares = []
    for start in range(0, 8, 2):
        valid = torch.cat([torch.arange(6) < n for n in lengths[start : start + 2]])
        shares.append(float(context(batch=2, valid=valid, totals=totals, world_size=world).at("x").share(scope)))
    assert sum(shares) == pytest.approx(world)
    assert shares[-1] == 0


def test_shares_without_padding_and_without_totals() -> None:
    totals = {"token": 96, "sequence": 16, "micro_step": 4}
    full = context(totals=totals, world_size=2).at("x")
    assert float(full.share("token")) == float(full.share("sequence")) == 0.5
    assert full.share("micro_step") == full.share("rank") == 0.25
    assert context().at("x").share("sequence") == 1.0


def test_only_the_micro_step_scope_reaches_other_ranks() -> None:
    class Double:
        def sum(self, tensor: Tensor) -> Tensor:
            return 2 * tensor

    layer = context(reducer=Double()).at("x")
    scopes = {scope: float(layer.reduce(torch.ones(()), scope)) for scope in ("token", "sequence", "rank", "micro_step")}
    assert scopes == {"token": 1, "sequence": 1, "rank": 1, "micro_step": 2}


def test_losses_of_one_name_add_up_over_layers_and_not_again_in_recomputation() -> None:
    ctx = context()
    ctx.add_loss("balance", torch.tensor(1.0))
    ctx.add_loss("balance", torch.tensor(2.0))
    ctx.add_loss("z", torch.tensor(5.0))
    ctx.recomputing = True
    ctx.add_loss("balance", torch.tensor(100.0))
    assert {name: float(value) for name, value in ctx.losses.items()} == {"balance": 3, "z": 5}


def make_model(**router: Any) -> Decoder:
    parts = MoEParts(
        router=TopKRouterConfig(top_k=2, jitter=0.1, **router),
        experts=FFNExpertsConfig(num_experts=4, width=5),
        capacity=SlotsConfig(factor=0.8),
        loss={"balance": ExpertBalanceConfig(coefficient=0.1), "z": ZLossConfig(), "global": ExpertBalanceConfig(scope="micro_step")},
    )
    config = DeepSeekMoEConfig(
        hidden_size=8,
        num_layers=3,
        num_heads=2,
        head_dim=4,
        num_experts=4,
        top_k=2,
        expert_width=5,
        shared_width=3,
        dense_layers=1,
        dense_width=7,
    )
    model = config.build(parts, vocab_size=11, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return model.train()


def run(model: Decoder, *, flip: bool = False) -> tuple[ForwardContext, dict[str, Tensor]]:
    """One forward and backward. flip: between them every router is turned around."""
    tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(1))
    ctx = context(training=True, valid=torch.arange(24) % 5 != 0)
    loss = model(tokens, ctx).square().mean() + sum(ctx.losses.values())
    if flip:
        for layer in model.moe_layers().values():
            layer.router.selection_bias.copy_(torch.tensor([9.0, -9.0, 9.0, -9.0]))
    loss.backward()
    return ctx, {name: p.grad for name, p in model.named_parameters()}


def test_recomputation_changes_no_gradient_loss_or_count() -> None:
    plain, recomputed = make_model(), make_model()
    for block in recomputed.layers:
        block.recompute = True
    (ctx, grads), (again, grads_again) = run(plain), run(recomputed)
    assert_close(grads_again, grads, "exact", name="grads")
    assert_close(again.losses, ctx.losses, "exact", name="losses")
    assert ctx.statistics.keys() == again.statistics.keys() == {"layers.1.ffn", "layers.2.ffn"}
    for name, seen in ctx.statistics.items():
        assert vars(seen).keys() == {"selected", "dispatched", "entropy", "tokens", "router"}
        assert_close(vars(again.statistics[name]), vars(seen), "exact", name=name)
        assert int(seen.selected.sum()) == 2 * int(seen.tokens) and int(seen.dispatched.sum()) < int(seen.selected.sum())


def test_the_recomputed_pass_uses_the_first_passs_choices_even_if_it_would_choose_others() -> None:
    plain, recomputed = make_model(selection_bias=True), make_model(selection_bias=True)
    for block in recomputed.layers:
        block.recompute = True
    assert_close(run(recomputed, flip=True)[1], run(plain)[1], "exact", name="grads")
