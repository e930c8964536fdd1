"""The top-k router: properties that hold for every setting, and what each setting does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetrain.config import load
from moetrain.errors import ConfigError
from moetrain.moe.context import ForwardContext, LayerStatistics, RouterContext
from moetrain.moe.experts.zero import ZeroExpertsConfig
from moetrain.moe.routers.topk import TopKRouter, TopKRouterConfig, distribution, score
from moetrain.testing import assert_close

T, D, E, K = 40, 6, 12, 3

SETTINGS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "renormalised": {"renormalise": True, "scale": 2.5},
    "sigmoid": {"score": "sigmoid", "renormalise": True, "renormalise_epsilon": 1e-20},
    "sqrt_softplus": {"score": "sqrt_softplus", "renormalise": True, "scale": 1.5},
    "selected softmax": {"score": "logit", "selected_softmax": True, "logit_bias": True},
    "biased groups": {
        "score": "sigmoid",
        "renormalise": True,
        "scale": 2.0,
        "selection_bias": True,
        "num_groups": 4,
        "groups_per_token": 2,
        "group_score_experts": 2,
    },
    "zero experts": {"zero_experts": ZeroExpertsConfig(num_constant=1, num_copy=2, num_null=1), "selection_bias": True},
    "soft cap": {"logit_soft_cap": 2.0, "renormalise": True},
}
DRAWN: dict[str, dict[str, Any]] = {
    "noisy": {"logit_noise": 4.0, "renormalise": True},
    "sampled": {"sampling": "all", "renormalise": True},
    "sampled later": {"sampling": "later", "score": "logit", "selected_softmax": True},
}
"""Noise belongs to a column, so these are not indifferent to the experts' names."""


def make(dtype: torch.dtype = torch.float64, *, seed: int = 0, **kwargs: Any) -> TopKRouter:
    router = TopKRouterConfig(**{"top_k": K, **kwargs}).build(D, E, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in router.parameters():
        nn.init.normal_(parameter, generator=generator)
    if router.selection_bias is not None:
        router.selection_bias.normal_(0, 0.2, generator=generator)
    return router


def context(**kwargs: Any) -> RouterContext:
    return ForwardContext(**{"batch_size": 2, "seq_len": T // 2, "training": True, **kwargs}).at("layers.0")


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("settings", (SETTINGS | DRAWN).values(), ids=(SETTINGS | DRAWN).keys())
def test_properties(settings: dict[str, Any]) -> None:
    router = make(**settings)
    routing = router(inputs(), context())
    columns = E + settings.get("zero_experts", ZeroExpertsConfig()).count
    assert bool((routing.weight >= 0).all())
    assert all(len(set(row)) == K for row in routing.expert_TK.tolist())
    assert int(routing.expert.min()) >= 0 and int(routing.expert.max()) < columns
    assert int(routing.selected.sum()) == T * K and routing.selected.numel() == columns
    assert_close(routing.probs.sum(1), torch.ones(T, dtype=torch.float64), "layout", name="probs")
    if settings.get("renormalise") or settings.get("selected_softmax"):
        expected = torch.full((T,), settings.get("scale", 1.0), dtype=torch.float64)
        assert_close(routing.weight_TK.sum(1), expected, "layout", name="weights of a token")


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_renaming_the_experts_renames_the_choices(settings: dict[str, Any]) -> None:
    router, renamed = make(**settings), make(**settings)
    columns, groups = router.num_columns, settings.get("num_groups", 1)
    generator = torch.Generator().manual_seed(3)
    # groups must stay together: permute them, and the experts within each
    size = columns // groups
    order = torch.cat(
        [group * size + torch.randperm(size, generator=generator) for group in torch.randperm(groups, generator=generator).tolist()]
    )
    with torch.no_grad():
        renamed.weight.copy_(router.weight[order])
        if router.bias is not None:
            renamed.bias.copy_(router.bias[order])
        if router.selection_bias is not None:
            renamed.selection_bias.copy_(router.selection_bias[order])
    a, b = router(inputs(), context()), renamed(inputs(), context())
    assert torch.equal(a.expert_TK, order[b.expert_TK])
    assert_close(b.weight_TK, a.weight_TK, "layout")


def test_a_constant_on_all_logits_or_all_biases_changes_no_choice() -> None:
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    router = make(selection_bias=True)
    before = router.route(logits, context())
    assert_close(router.route(logits + 3.0, context()).weight, before.weight, "layout")
    assert torch.equal(router.route(logits + 3.0, context()).expert, before.expert)
    router.selection_bias += 5.0
    assert torch.equal(router.route(logits, context()).expert, before.expert)


def test_softmax_renormalised_is_the_softmax_of_the_selected_logits() -> None:
    r = torch.randn(T, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = []
    for settings in ({"renormalise": True}, {"score": "logit", "selected_softmax": True}):
        x = inputs().requires_grad_()
        router = make(**settings)
        routing = router(x, context())
        (routing.weight_TK * r).sum().backward()
        found.append((routing.expert, routing.weight, x.grad, router.weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        assert_close(a, b, "layout")


def test_the_selection_bias_moves_choices_but_not_the_weights_of_those_that_stay() -> None:
    router = make(selection_bias=True)
    biased = router(inputs(), context())
    router.selection_bias.zero_()
    plain = router(inputs(), context())
    same = biased.expert_TK[:, :, None] == plain.expert_TK[:, None, :]
    assert 0 < int(same.sum()) < T * K
    tokens, i, j = same.nonzero(as_tuple=True)
    assert_close(biased.weight_TK[tokens, i], plain.weight_TK[tokens, j], "exact")
    assert not any("selection_bias" in name for name, _ in router.named_parameters())
    assert "selection_bias" in router.state_dict()


def test_the_bias_update_moves_only_unbalanced_experts_by_gamma() -> None:
    router = make(selection_bias=True, bias_update_rate=0.01)
    router.selection_bias.zero_()
    counts = torch.tensor([5, 5, 9, 1] + [5] * (E - 4))
    router.end_step(LayerStatistics(counts, counts, torch.zeros(()), counts.sum()))
    expected = torch.tensor([0, 0, -0.01, 0.01] + [0] * (E - 4), dtype=torch.float64)
    assert_close(router.selection_bias, expected, "exact")


def test_a_proportional_update_is_relative_to_the_mean_load_and_evens_out() -> None:
    router = make(selection_bias=True, bias_update_rate=0.01, bias_update="proportional")
    for scale in (1, 1000):
        router.selection_bias.zero_()
        counts = scale * torch.tensor([5, 5, 9, 1] + [5] * (E - 4))
        router.end_step(LayerStatistics(counts, counts, torch.zeros(()), counts.sum()))
        expected = torch.tensor([0, 0, -0.008, 0.008] + [0] * (E - 4), dtype=torch.float64)
        assert_close(router.selection_bias, expected, "layout")
    none = torch.zeros(E, dtype=torch.int64)
    router.end_step(LayerStatistics(none, none, torch.zeros(()), none.sum()))
    assert_close(router.selection_bias, expected, "layout")


@pytest.mark.parametrize(("num_groups", "keep", "best"), [(4, 2, 1), (4, 2, 2), (6, 3, 2), (3, 1, 3), (12, 5, 1)])
def test_a_token_uses_only_its_best_groups(num_groups: int, keep: int, best: int) -> None:
    router = make(num_groups=num_groups, groups_per_token=keep, group_score_experts=best)
    routing = router(inputs(), context())
    size = E // num_groups
    group_scores = routing.probs.unflatten(1, (num_groups, size)).topk(best, dim=2).values.sum(2)
    allowed = group_scores.topk(keep, dim=1).indices
    assert bool(((routing.expert_TK // size)[:, :, None] == allowed[:, None, :]).any(2).all())


def test_groups_with_negative_biased_scores_are_not_beaten_by_excluded_ones() -> None:
    router = make(score="sigmoid", selection_bias=True, num_groups=4, groups_per_token=1)
    router.selection_bias.fill_(-10.0)
    groups = router(inputs(), context()).expert_TK // (E // 4)
    assert bool((groups == groups[:, :1]).all())


def test_jitter_is_for_training_and_does_not_depend_on_how_often_one_asks() -> None:
    router = make(jitter=0.3)
    still = router(inputs(), context(training=False))
    assert_close(still.logits, make()(inputs(), context()).logits, "exact")
    first, again = router(inputs(), context()), router(inputs(), context())
    assert torch.equal(first.logits, again.logits)
    assert not torch.equal(first.logits, still.logits)
    assert not torch.equal(first.logits, router(inputs(), context(step=1)).logits)
    bound = (inputs().abs() * 0.3) @ router.weight.abs().T
    assert bool(((first.logits - still.logits).abs() <= bound).all())


def test_half_precision_inputs_are_routed_in_float32() -> None:
    routing = make(torch.float32)(inputs(torch.bfloat16), context())
    assert routing.logits.dtype == routing.probs.dtype == routing.weight.dtype == torch.float32


def test_padding_tokens_choose_nothing() -> None:
    valid = torch.arange(T) % 3 != 0
    routing = make()(inputs(), context(valid=valid))
    assert torch.equal((routing.expert_TK >= 0).all(1), valid) and torch.equal((routing.expert_TK >= 0).any(1), valid)
    assert int(routing.selected.sum()) == K * int(valid.sum())


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "sqrt_softplus", "logit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shift", [0.0, -69.0, -500.0, 80.0])
def test_probabilities_sum_to_one_however_small_the_scores(kind: str, dtype: torch.dtype, shift: float) -> None:
    logits = (torch.randn(20, E, generator=torch.Generator().manual_seed(0)) + shift).to(dtype).requires_grad_()
    probs = distribution(logits, kind)
    assert_close(probs.sum(1), torch.ones(20, dtype=dtype), "layout")
    probs[:, 0].sum().backward()
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("kind", ["sigmoid", "sqrt_softplus"])
def test_probabilities_are_the_normalised_scores(kind: str) -> None:
    logits = torch.linspace(-30, 10, 5 * E, dtype=torch.float64).view(E, 5).T.requires_grad_()
    affinity = score(logits, kind)
    expected = affinity / affinity.sum(1, keepdim=True)
    assert_close(distribution(logits, kind), expected, "layout")
    r = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
    (a,) = torch.autograd.grad((distribution(logits, kind) * r).sum(), logits)
    (b,) = torch.autograd.grad((expected * r).sum(), logits)
    assert_close(a, b, "layout")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"top_k": 2, "num_groups": 2, "groups_per_token": 3}, r"router\.groups_per_token.*3.*must be <= router\.num_groups"),
        ({"top_k": 2, "bias_update_rate": 0.1}, r"router\.bias_update_rate.*needs router\.selection_bias=true"),
        ({"top_k": 2, "selected_softmax": True}, r"router\.selected_softmax.*router\.score=logit"),
        ({"top_k": 0}, r"router\.top_k.*0.*>= 1"),
        ({"top_k": 2, "sampling": "all", "score": "sigmoid"}, r"router\.sampling.*'all'.*needs router\.score=softmax or logit"),
        ({"top_k": 2, "sampling": "later", "selection_bias": True}, r"router\.sampling.*no selection_bias"),
        ({"top_k": 1, "sampling": "later"}, r"router\.sampling.*needs router\.top_k >= 2"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(TopKRouterConfig, data, path="router")


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"num_groups": 5}, "router.num_groups"),
        ({"top_k": 4, "num_groups": 4, "groups_per_token": 1}, "router.top_k"),
        ({"num_groups": 6, "groups_per_token": 3, "group_score_experts": 3}, "router.group_score_experts"),
    ],
)
def test_settings_that_do_not_fit_the_experts_are_named(settings: dict[str, Any], field: str) -> None:
    problems = list(TopKRouterConfig(**{"top_k": K, **settings}).check("router", num_experts=E))
    assert [problem.field for problem in problems] == [field]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_and_their_gradients_are_finite_for_extreme_logits(dtype):
    for kind in ("softmax", "sigmoid", "sqrt_softplus", "logit"):
        logits = torch.tensor([[-500.0, -200.0, -41.0, -39.0, 0.0, 50.0, 500.0]], dtype=dtype, requires_grad=True)
        (score(logits, kind).sum() + distribution(logits, kind)[0, 0]).backward()
        assert torch.isfinite(logits.grad).all(), kind


DRAWS = 20_000


def one_token_many_times(logits: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """Choices and weights, each [DRAWS, K], of a token with these logits at as many positions."""
    router = TopKRouterConfig(**{"top_k": K, **settings}).build(1, logits.numel(), dtype=torch.float64)
    routing = router.route(logits.repeat(DRAWS, 1), context(batch_size=DRAWS // 100, seq_len=100))
    return routing.expert_TK, routing.weight_TK


def test_sampled_choices_have_the_probabilities_of_the_softmax_and_their_weights() -> None:
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
    chosen, weight = one_token_many_times(probs.log(), sampling="all", top_k=2)
    frequency = torch.bincount(chosen[:, 0], minlength=4) / DRAWS
    assert float((frequency - probs).abs().max()) < 0.015  # 4 standard deviations
    after_first = torch.bincount(chosen[chosen[:, 0] == 0, 1], minlength=4).double()
    assert float((after_first / after_first.sum() - torch.tensor([0, 0.5, 0.3, 0.2])).abs().max()) < 0.02
    assert_close(weight, probs[chosen], "layout")


def test_sampling_of_later_choices_keeps_the_best_one_first() -> None:
    probs = torch.tensor([0.25, 0.5, 0.15, 0.1], dtype=torch.float64)
    chosen, weight = one_token_many_times(probs.log(), sampling="later", top_k=3)
    assert bool((chosen[:, 0] == 1).all()) and all(len(set(row)) == 3 for row in chosen[:100].tolist())
    second = torch.bincount(chosen[:, 1], minlength=4) / DRAWS
    assert float((second - torch.tensor([0.5, 0, 0.3, 0.2])).abs().max()) < 0.015
    assert_close(weight, probs[chosen], "layout")


@pytest.mark.parametrize("settings", [{"sampling": "all"}, {"sampling": "later"}, {"logit_noise": 5.0}], ids=str)
def test_noise_is_for_training_and_belongs_to_a_token_not_to_its_place_in_the_batch(settings: dict[str, Any]) -> None:
    noisy, plain = make(**settings), make()
    assert torch.equal(noisy(inputs(), context(training=False)).expert, plain(inputs(), context()).expert)
    whole = noisy(inputs(), context(sample=torch.tensor([3, 8])))
    assert not torch.equal(whole.expert, plain(inputs(), context()).expert)
    second = noisy(inputs()[T // 2 :], context(batch_size=1, sample=torch.tensor([8])))
    assert torch.equal(second.expert_TK, whole.expert_TK[T // 2 :])
    assert_close(second.weight_TK, whole.weight_TK[T // 2 :], "layout")


def test_a_recomputed_pass_takes_the_sampled_choices_again() -> None:
    router, ctx = make(sampling="all"), context()
    first = router(inputs(), ctx)
    ctx.forward.recomputing = True
    assert torch.equal(router(inputs() + 1e-9, ctx).expert, first.expert)


def test_logit_noise_has_the_stated_deviation_and_leaves_the_clean_logits_to_losses() -> None:
    router = make(logit_noise=3.0)
    assert router.config.provides == {"clean_logits", "noise_std"} and not make().config.provides
    routing = router(inputs(), context())
    clean = make()(inputs(), context())
    assert_close(routing.aux["clean_logits"], clean.logits, "exact")
    noise = (routing.logits - routing.aux["clean_logits"]).detach() / (3.0 / E)
    assert float(routing.aux["noise_std"]) == 3.0 / E
    assert abs(noise.mean().item()) < 0.2 and abs(noise.std().item() - 1) < 0.15  # 480 draws
    assert_close(routing.probs, routing.logits.softmax(1), "layout")
    assert not router(inputs(), context(training=False)).aux
