"""Small models and routings under which layouts are compared, from easy to awkward, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import moetrain.components  # noqa: F401
from moetrain.models.deepseek_moe import DeepSeekMoEConfig
from moetrain.models.glam import GLaMConfig
from moetrain.moe.context import RouterContext
from moetrain.moe.experts import ZeroExpertsConfig
from moetrain.moe.layer import MoEParts
from moetrain.moe.routers.base import LinearRouter
from moetrain.moe.routing import Routing, ragged_routing
from moetrain.registry import lookup
from moetrain.testing.layouts import Outcome, Scenario
from moetrain.testing.tolerances import assert_close


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


def top_p(**scenario: Any) -> Scenario:
    """Top-p routing with the losses of its paper."""
    made = deepseek(**scenario)
    made.parts.router = lookup("router", "top_p")(threshold=0.5)
    balance = lookup("loss", "expert_balance")(coefficient=0.05, scope="micro_step", normalisation="per_token")
    made.parts.loss = {"balance": balance, "entropy": lookup("loss", "entropy")(coefficient=0.1)}
    return made


def null_experts(**scenario: Any) -> Scenario:
    """Null experts that take half of the choices: tokens with none to all of theirs computed."""
    router = dict(renormalise=True, renormalise_null=False, zero_experts=ZeroExpertsConfig(num_null=6))
    loss = {"balance": lookup("loss", "expert_balance")(coefficient=0.05, scope="micro_step", pool_zero=True)}
    return deepseek(top_k=3, router=router, loss=loss, **scenario)


def gating_residuals(**scenario: Any) -> Scenario:
    """MoE++: scores travel from layer to layer, every kind of zero-computation expert, loss and capacity by kind."""
    made = deepseek(**scenario)
    kinds = ZeroExpertsConfig(num_constant=2, num_copy=1, num_null=1)
    made.parts.router = lookup("router", "residual_topk")(top_k=2, zero_experts=kinds, hidden_multiple=2)
    made.parts.capacity = lookup("capacity", "slots_by_kind")(factor=0.9)
    made.parts.loss = {"balance": lookup("loss", "heterogeneous_balance")(coefficient=0.05, scope="micro_step")}
    return made


def recurrent(**scenario: Any) -> Scenario:
    """A recurrent state along depth, through a cell that all layers share."""
    made = deepseek(**scenario)
    made.parts.router = lookup("router", "recurrent_topk")(top_k=2, renormalise=True, state_size=5)
    return made


GLOBAL = {"g": lookup("loss", "expert_balance")(coefficient=0.05, scope="micro_step")}
SCENARIOS = {
    "deepseek": deepseek(),
    "padded": deepseek(pad=True),
    "fewer_experts_than_ranks": deepseek(num_experts=2),
    "global_balance": deepseek(loss=GLOBAL, pad=True),
    "aux_free": deepseek(router=dict(score="sigmoid", renormalise=True, selection_bias=True, bias_update_rate=0.1)),
    "zero_experts": deepseek(router=dict(zero_experts=ZeroExpertsConfig(num_constant=2, num_copy=1, num_null=1))),
    "all_to_one": deepseek(repeat_token=True),
    "recompute": deepseek(recompute=True, pad=True),
    "accumulate": deepseek(micro_batch_size=1),
    "glam_capacity": glam(pad=True),
    "ragged": ragged(pad=True),
    "ragged_recompute": ragged(recompute=True),
    "noisy_gates": noisy_gates(pad=True),
    "top_p": top_p(pad=True),
    "null_experts": null_experts(pad=True),
    "recurrent": recurrent(pad=True),
    "recurrent_recompute": recurrent(recompute=True),
    "gating_residuals": gating_residuals(pad=True),
    "gating_residuals_recompute": gating_residuals(recompute=True),
}


def compare(actual: Outcome, expected: Outcome) -> None:
    """Raises AssertionError unless losses, norms, loads, gradients and weights agree to the layout tolerance."""
    for field in ("losses", "totals", "norms"):
        assert_close(
            torch.tensor(getattr(actual, field), dtype=torch.float64),
            torch.tensor(getattr(expected, field), dtype=torch.float64),
            kind="layout",
        )
    assert actual.selected == expected.selected
    for field in ("gradients", "parameters"):
        ours, reference = getattr(actual, field), getattr(expected, field)
        assert ours.keys() == reference.keys()
        for key in reference:
            assert_close(ours[key], reference[key], kind="layout")
