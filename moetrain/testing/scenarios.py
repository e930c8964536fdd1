"""Small models and routings under which layouts are compared, from easy to awkward, in float64.

Of the routers only those that ask something of a layout: state along depth, ragged choices, draws, whole sequences, buffers.
All of them are in :mod:`moetrain.testing.router_table`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import moetrain.components  # noqa: F401
from moetrain.models.deepseek_moe import DeepSeekMoEConfig
from moetrain.models.glam import GLaMConfig
from moetrain.moe.context import RouterContext
from moetrain.moe.experts import ZeroExpertsConfig
from moetrain.moe.layer import MoEParts
from moetrain.moe.routers.base import LinearRouter
from moetrain.moe.routing import Routing, fixed_routing, ragged_routing
from moetrain.registry import lookup
from moetrain.testing.layouts import Outcome, Scenario
from moetrain.testing.tolerances import assert_close, max_error


def deepseek(num_experts: int = 6, top_k: int = 2, router: dict[str, Any] | None = None, loss: Any = None, **scenario: Any) -> Scenario:
    """Fine-grained experts, a shared one, two losses."""
    model = DeepSeekMoEConfig(
        hidden_size=16, num_layers=3, num_heads=2, head_dim=8, num_experts=num_experts, top_k=top_k, expert_width=12,
        shared_width=8, dense_width=20, init_std=0.3,
    )  # fmt: skip
    parts = MoEParts(
        router=lookup("router", "topk")(top_k=top_k, **(router or {})),
        experts=lookup("experts", "ffn")(num_experts=num_experts, width=12),
        capacity=lookup("capacity", "none")(),
        loss=loss or {"balance": lookup("loss", "expert_balance")(coefficient=0.05), "z": lookup("loss", "z_loss")(coefficient=0.01)},
    )
    return Scenario(model=model, parts=parts, **scenario)


def glam(**scenario: Any) -> Scenario:
    """Two-matrix experts with capacity, relative attention bias."""
    model = GLaMConfig(hidden_size=16, num_layers=2, num_heads=2, head_dim=8, num_experts=4, expert_width=12, dense_width=20)
    parts = MoEParts(
        router=lookup("router", "topk")(top_k=2, renormalise=True, renormalise_epsilon=1e-9),
        experts=lookup("experts", "ffn")(num_experts=4, width=12, activation="relu", gated=False),
        capacity=lookup("capacity", "slots")(factor=1.0, choices=1, round="down"),
        loss={"balance": lookup("loss", "switch_balance")()},
    )
    return Scenario(model=model, parts=parts, **scenario)


def noisy_gates(**scenario: Any) -> Scenario:
    """Everything that draws: noisy cosine logits, sampled second choices, random token selection; a loss that is linear
    in nothing, over all ranks."""
    made = deepseek(**scenario)
    made.parts.router = lookup("router", "cosine_topk")(top_k=2, projection_size=4, logit_noise=1.0, sampling="later")
    made.parts.capacity = lookup("capacity", "slots")(factor=1.0, priority="random", renormalise=True)
    made.parts.loss = {"balance": lookup("loss", "load_importance")(coefficient=0.05, scope="micro_step")}
    return made


def routed(router: str, settings: dict[str, Any] | None = None, **scenario: Any) -> Scenario:
    """The model of :func:`deepseek` with another router; without losses unless some are given."""
    made = deepseek(**scenario)
    made.parts.router = lookup("router", router)(**(settings or {}))
    made.parts.loss = scenario.get("loss") or {}
    return made


def comet(**scenario: Any) -> Scenario:
    """Trees whose permutations are learned for two steps and then stay."""
    made = deepseek(**scenario)
    made.parts.router = lookup("router", "comet")(num_trees=2, width=0.5, split_bias=True, permutation_steps=2)
    made.parts.loss = {name: lookup("loss", name)(coefficient=0.05) for name in ("selector_entropy", "permutation_entropy")}
    return made


def stochastic(granularity: str, **scenario: Any) -> Scenario:
    """Random experts and two passes that have to agree."""
    made = deepseek(objective=lookup("objective", "consistency")(alpha=5.0), **scenario)
    made.parts.router = lookup("router", "stochastic")(granularity=granularity)
    return made


def mixed(name: str, settings: dict[str, Any], **scenario: Any) -> Scenario:
    """Another residual rule."""
    made = deepseek(**scenario)
    made.parts.mixer = lookup("mixer", name)(**settings)
    return made


@dataclass(kw_only=True)
class RaggedConfig:
    """Every expert whose probability is above average: a different number for each token, also none."""

    def build(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> RaggedRouter:
        return RaggedRouter(hidden_size, num_experts, dtype=dtype)


class RaggedRouter(LinearRouter):
    """Every expert above average, by chance."""

    def forward(self, x: Tensor, ctx: RouterContext) -> Routing:
        logits = self.logits(x)
        probs = torch.softmax(logits, dim=1)
        chance = ctx.uniform("ragged", self.num_experts, dtype=probs.dtype)
        selected = ctx.once("select", lambda: (probs > 1.0 / self.num_experts) & (chance < 0.7))
        return ragged_routing(selected, probs, num_experts=self.num_experts, logits=logits, probs=probs, valid=ctx.valid)


def ragged(**scenario: Any) -> Scenario:
    """Any number of experts per token."""
    made = deepseek(**scenario)
    made.parts.router = RaggedConfig()
    return made


def gating_residuals(**scenario: Any) -> Scenario:
    """MoE++: scores travel from layer to layer, every kind of zero-computation expert, loss and capacity by kind."""
    made = deepseek(**scenario)
    kinds = ZeroExpertsConfig(num_constant=2, num_copy=1, num_null=1)
    made.parts.router = lookup("router", "residual_topk")(top_k=2, zero_experts=kinds, hidden_multiple=2)
    made.parts.capacity = lookup("capacity", "slots_by_kind")(factor=0.9)
    made.parts.loss = {"balance": lookup("loss", "heterogeneous_balance")(coefficient=0.05, scope="micro_step")}
    return made


def dropped(**scenario: Any) -> Scenario:
    """Every dropout of routes before capacity."""
    rates = {"random_second": dict(factor=1.5), "expert_dropout": dict(rate=0.2), "gating_dropout": dict(rate=0.3)}
    made = deepseek(router=dict(renormalise=True), **scenario)
    made.parts.capacity = lookup("capacity", "slots")(factor=1.0, factor_start=2.0)
    made.parts.dropout = {name: lookup("dropout", name)(**settings) for name, settings in rates.items()}
    return made


def recurrent(**scenario: Any) -> Scenario:
    """A recurrent state along depth, through a cell that all layers share."""
    made = deepseek(**scenario)
    made.parts.router = lookup("router", "recurrent_topk")(top_k=2, renormalise=True, state_size=5)
    return made


Skew = Literal["uniform", "zipf", "one"]


@dataclass(kw_only=True)
class DrawnConfig:
    """Experts drawn by a fixed popularity: all alike, proportional to rank^-1.2, or one for all tokens (with top_k = 1)."""

    skew: Skew
    top_k: int

    def build(self, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> DrawnRouter:
        return DrawnRouter(self, hidden_size, num_experts, dtype=dtype)


class DrawnRouter(LinearRouter):
    """K different experts by chance, weighted by learned probabilities."""

    def __init__(self, config: DrawnConfig, hidden_size: int, num_experts: int, *, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, num_experts, dtype=dtype)
        self.config = config

    def forward(self, x: Tensor, ctx: RouterContext) -> Routing:
        logits = self.logits(x)
        probs = torch.softmax(logits, dim=1)
        chance = ctx.uniform("draw", self.num_experts, dtype=probs.dtype)
        index = ctx.once("select", lambda: self.draw(chance))
        weight = probs.gather(1, index)
        return fixed_routing(index, weight, num_experts=self.num_experts, logits=logits, probs=probs, valid=ctx.valid)

    def draw(self, chance: Tensor) -> Tensor:
        """[T, K] experts, without replacement, by the Gumbel maximum trick. chance: [T, E] in [0, 1)."""
        place = torch.arange(1, self.num_experts + 1, dtype=chance.dtype, device=chance.device)
        popularity = {"uniform": torch.ones_like(place), "zipf": place**-1.2, "one": (place == 1).to(chance.dtype)}[self.config.skew]
        return (popularity.log() - (-chance.log()).log()).topk(self.config.top_k, dim=1).indices


def drawn(skew: Skew, top_k: int = 2, **scenario: Any) -> Scenario:
    """Loads that no training changes."""
    made = deepseek(top_k=top_k, **scenario)
    made.parts.router = DrawnConfig(skew=skew, top_k=top_k)
    return made


GLOBAL = {"g": lookup("loss", "expert_balance")(coefficient=0.05, scope="micro_step")}
RANDOM = dict(score="logit", selected_softmax=True, logit_bias=True, trained=False)
SCENARIOS = {
    "deepseek": deepseek(),
    "uniform": drawn("uniform"),
    "zipf": drawn("zipf"),
    "all_to_one": drawn("one", top_k=1),
    "same_token": deepseek(repeat_token=True),
    "padded": deepseek(pad=True),
    "fewer_experts_than_ranks": deepseek(num_experts=2),
    "global_balance": deepseek(loss=GLOBAL, pad=True),
    "aux_free": deepseek(router=dict(score="sigmoid", renormalise=True, selection_bias=True, bias_update_rate=0.1)),
    "dropout": dropped(pad=True, recompute=True),
    "zero_experts": deepseek(router=dict(zero_experts=ZeroExpertsConfig(num_constant=2, num_copy=1, num_null=1))),
    "recompute": deepseek(recompute=True, pad=True),
    "accumulate": deepseek(micro_batch_size=1),
    "glam_capacity": glam(pad=True),
    "ragged": ragged(pad=True),
    "ragged_recompute": ragged(recompute=True),
    "noisy_gates": noisy_gates(pad=True),
    "recurrent": recurrent(pad=True),
    "recurrent_recompute": recurrent(recompute=True),
    "gating_residuals": gating_residuals(pad=True),
    "gating_residuals_recompute": gating_residuals(recompute=True),
    "expert_choice": routed("expert_choice", dict(allow_future=True), pad=True, recompute=True),
    "random_router": deepseek(router=dict(**RANDOM, top_k_start=4), recompute=True),
    "random_cell": routed("recurrent_topk", dict(top_k=2, state_size=5, trained=False), pad=True),
    "router_frozen_at_first": deepseek(router=dict(trained_from=0.4)),
    "stochastic": stochastic("token", pad=True),
    "one_random_expert": stochastic("pass", recompute=True),
    "comet": comet(pad=True, recompute=True),
    "momentum": mixed("momentum", dict(mu=0.7, gamma=0.5), recompute=True),
    # the rule divides by the size of its input, which amplifies rounding
    "adam": mixed("adam", dict(mu=0.5), pad=True, lr=1e-4),
    "robust_momentum": mixed("robust_momentum", dict(rate=0.7), recompute=True),
}


def pairs(actual: Outcome, expected: Outcome) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Everything that two outcomes must agree in: (name, actual, expected). Raises AssertionError if their keys differ."""
    for field in ("losses", "totals", "norms"):
        ours, reference = (torch.tensor(getattr(outcome, field), dtype=torch.float64) for outcome in (actual, expected))
        yield field, ours, reference
    for step, (loads, reference_loads) in enumerate(zip(actual.selected, expected.selected, strict=True)):
        for layer, load in reference_loads.items():
            yield f"load of {layer} in step {step}", torch.tensor(loads[layer]), torch.tensor(load)
    for field in ("outputs", "gradients", "parameters"):
        tensors, reference_tensors = getattr(actual, field), getattr(expected, field)
        assert tensors.keys() == reference_tensors.keys(), f"{field}: {sorted(tensors.keys() ^ reference_tensors.keys())}"
        yield from ((f"{field}[{key}]", tensors[key], reference_tensors[key]) for key in reference_tensors)


def compare(actual: Outcome, expected: Outcome) -> None:
    """Raises AssertionError unless losses, norms, loads, outputs, gradients and weights agree to the layout tolerance."""
    for name, ours, reference in pairs(actual, expected):
        assert_close(ours, reference, kind="layout", name=name)


def largest_error(actual: Outcome, expected: Outcome) -> float:
    """The largest relative error of all that :func:`compare` looks at."""
    return max(max_error(ours, reference) for _, ours, reference in pairs(actual, expected))
