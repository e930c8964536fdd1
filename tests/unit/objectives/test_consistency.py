"""Two passes that have to agree."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moetrain.models.common.vocabulary import WholeVocabulary
from moetrain.objectives.consistency import ConsistencyConfig, symmetric_divergence
from moetrain.testing import assert_close
from moetrain.testing.layouts import train_steps
from moetrain.testing.scenarios import SCENARIOS


def random(seed: int) -> Tensor:
    return torch.randn(6, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def divergence(first: Tensor, second: Tensor) -> Tensor:
    return symmetric_divergence(first, second, WholeVocabulary())


def test_divergence_is_zero_for_equal_distributions_only_symmetric_and_never_negative() -> None:
    a, b = random(0), random(1)
    assert_close(divergence(a, a + 3.0), torch.zeros(6, dtype=torch.float64), "layout")
    assert bool((divergence(a, b) > 0).all())
    assert torch.equal(divergence(a, b), divergence(b, a))
    p, q = a.softmax(1), b.softmax(1)
    kl = lambda p, q: (p * (p / q).log()).sum(1)  # noqa: E731
    assert_close(divergence(a, b), (kl(p, q) + kl(q, p)) / 2, "layout")


def test_probabilities_that_underflow_stay_finite_with_their_gradient() -> None:
    a = torch.tensor([[0.0, -2000.0]], requires_grad=True)
    value = divergence(a, torch.tensor([[-2000.0, 0.0]])).sum()
    value.backward()
    assert value == 2000 and bool(a.grad.isfinite().all())  # type: ignore[union-attr]


def test_a_pass_without_noise_agrees_with_itself() -> None:
    """With one expert, or none that is random, and without dropout."""
    deterministic = replace(SCENARIOS["deepseek"], objective=ConsistencyConfig(), steps=1)
    outcome, plain = train_steps(0, 1, deterministic, "single"), train_steps(0, 1, SCENARIOS["deepseek"], "single")
    assert_close(outcome.losses[0], plain.losses[0], "layout")
    # auxiliary losses keep their strength, the second pass adds its likelihood, the divergence nothing
    assert_close(outcome.totals[0], plain.totals[0] + plain.losses[0], "layout")
    assert outcome.selected[0] == {name: [2 * n for n in counts] for name, counts in plain.selected[0].items()}


def test_random_experts_disagree() -> None:
    outcomes = []
    for alpha in (0.0, 5.0):
        made = replace(SCENARIOS["stochastic"], objective=ConsistencyConfig(alpha=alpha), steps=1)
        outcomes.append(train_steps(0, 1, made, "single").totals[0])
    assert outcomes[1] > outcomes[0] + 1e-6
