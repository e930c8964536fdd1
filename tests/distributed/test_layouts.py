"""Every layout computes what one process computes: losses, gradients, norm and updated weights, in float64."""

from dataclasses import dataclass, replace

import pytest
import torch

import moetrain.models
import moetrain.moe.losses  # noqa: F401
from moetrain.models.deepseek_moe import DeepSeekMoEConfig
from moetrain.models.glam import GLaMConfig
from moetrain.moe.layer import MoEParts
from moetrain.moe.routers.base import LinearRouter
from moetrain.moe.routing import ragged_routing
from moetrain.registry import lookup
from moetrain.testing.distributed import run_distributed
from moetrain.testing.layouts import Scenario, merge, train_steps
from moetrain.testing.tolerances import assert_close


def deepseek(num_experts=6, top_k=2, router=None, loss=None, **scenario):
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


def glam(**scenario):
    model = GLaMConfig(hidden_size=16, num_layers=2, num_heads=2, head_dim=8, num_experts=4, expert_width=12, dense_width=20)
    parts = MoEParts(
        router=lookup("router", "topk")(top_k=2, renormalise=True, renormalise_epsilon=1e-9),
        experts=lookup("experts", "ffn")(num_experts=4, width=12, activation="relu", gated=False),
        capacity=lookup("capacity", "slots")(factor=1.0, choices=1, round="down"),
        loss={"balance": lookup("loss", "switch_balance")()},
    )
    return Scenario(model=model, parts=parts, **scenario)


@dataclass(kw_only=True)
class RaggedConfig:
    """Every expert whose probability is above average: a different number for each token, also none."""

    def build(self, hidden_size, num_experts, *, dtype):
        return RaggedRouter(hidden_size, num_experts, dtype=dtype)


class RaggedRouter(LinearRouter):
    def forward(self, x, ctx):
        logits = self.logits(x)
        probs = torch.softmax(logits, dim=1)
        chance = ctx.uniform("ragged", self.num_experts, dtype=probs.dtype)
        selected = ctx.once("select", lambda: (probs > 1.0 / self.num_experts) & (chance < 0.7))
        return ragged_routing(selected, probs, num_experts=self.num_experts, logits=logits, probs=probs, valid=ctx.valid)


def ragged(**scenario):
    made = deepseek(**scenario)
    made.parts.router = RaggedConfig()
    return made


GLOBAL = {"g": lookup("loss", "expert_balance")(coefficient=0.05, scope="micro_step")}
SCENARIOS = {
    "deepseek": deepseek(),
    "padded": deepseek(pad=True),
    "fewer_experts_than_ranks": deepseek(num_experts=2),
    "global_balance": deepseek(loss=GLOBAL, pad=True),
    "aux_free": deepseek(router=dict(score="sigmoid", renormalise=True, selection_bias=True, bias_update_rate=0.1)),
    "zero_experts": deepseek(router=dict(num_zero_experts=2)),
    "all_to_one": deepseek(repeat_token=True),
    "recompute": deepseek(recompute=True, pad=True),
    "accumulate": deepseek(micro_batch_size=1),
    "glam_capacity": glam(pad=True),
    "ragged": ragged(pad=True),
    "ragged_recompute": ragged(recompute=True),
}
LAYOUTS = [("ep", 2, 1), ("ep", 4, 1), ("fsdp", 2, 1), ("ep", 4, 2), ("fsdp", 4, 2), ("ep", 3, 1)]
PAIRS = [(name, LAYOUTS[(i + j) % 5]) for i, name in enumerate(SCENARIOS) for j in range(2)] + [("deepseek", LAYOUTS[4])]


def compare(actual, expected):
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


@pytest.mark.parametrize(("name", "layout"), PAIRS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)))
def test_a_layout_changes_nothing(name, layout):
    kind, world_size, replicate = layout
    scenario = SCENARIOS[name]
    expected = train_steps(0, 1, scenario, "single")
    actual = merge(run_distributed(train_steps, world_size, scenario, kind, replicate))
    compare(actual, expected)


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("name", ["padded", "glam_capacity", "aux_free"])
def test_micro_batches_change_nothing(name, micro):
    compare(train_steps(0, 1, replace(SCENARIOS[name], micro_batch_size=micro), "single"), train_steps(0, 1, SCENARIOS[name], "single"))


@pytest.mark.parametrize("name", ["padded", "glam_capacity", "global_balance"])
def test_recomputation_is_bit_equal(name):
    plain, recomputed = (train_steps(0, 1, replace(SCENARIOS[name], recompute=r), "single") for r in (False, True))
    assert (plain.losses, plain.norms, plain.selected) == (recomputed.losses, recomputed.norms, recomputed.selected)
    assert all(torch.equal(plain.gradients[key], recomputed.gradients[key]) for key in plain.gradients)
