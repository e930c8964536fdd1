"""Experts made from one FFN: what they take over, and which configurations are refused."""

from itertools import combinations

import pytest
import torch

import moetrain.components  # noqa: F401
from moetrain.config import load
from moetrain.errors import ConfigError
from moetrain.moe.context import ForwardContext
from moetrain.moe.experts import SpawnSettings
from moetrain.parallel.layouts import Layout
from moetrain.parallel.parallelize import parallelize
from moetrain.parallel.ranks import Ranks
from moetrain.registry import lookup
from moetrain.testing.scenarios import deepseek, glam
from moetrain.testing.tolerances import assert_close
from moetrain.train.events import spawn_experts
from moetrain.train.optim import AdamWConfig
from moetrain.train.settings import Config
from moetrain.train.state import all_tensors

MASK = 0.3


def build(scenario, *, one_expert):
    """The model on one process, and all of its state by logical key."""
    scenario.parts.one_expert = one_expert
    with torch.device("meta"):
        model = scenario.model.build(scenario.parts, vocab_size=20, dtype=torch.float64)
    placed = parallelize(model, Layout("single", 1, 1), Ranks(), device=torch.device("cpu"))
    placed.initialise(seed=0)
    return model, all_tensors(placed, AdamWConfig(lr=0.1).build(placed))


def spawned(settings, scenario=None, seed=0):
    """(model, state) before the event and after it; moments are 1, 2, 3, ..."""
    scenario = scenario or deepseek(num_experts=4)
    before, after = build(scenario, one_expert=True), build(scenario, one_expert=False)
    for key, tensor in before[1].items():
        if key.startswith("optim."):
            tensor.copy_(torch.arange(1.0, tensor.numel() + 1).view_as(tensor))
    spawn_experts(before[1], after[1], settings, seed=seed)
    return before, after


def families(old, new):
    """(parent, [4, ...] its experts) for each matrix of each layer, and their moments."""
    for key, parent in old.items():
        if ".expert." in key:
            layer, tensor = key.split(".expert.")
            yield key, parent, torch.stack([new[f"{layer}.experts.{e}.{tensor.replace('.weight', '')}"] for e in range(4)])


def test_experts_equal_the_parent_outside_the_mask_and_differ_pairwise_inside():
    (_, old), (_, new) = spawned(SpawnSettings(mask=MASK, noise=0.5))
    weights, moments = 0, 0
    for key, parent, experts in families(old, new):
        masked = experts != parent
        assert abs(masked.double().mean() - MASK) < 0.1
        for a, b in combinations(range(4), 2):
            assert not torch.equal(masked[a], masked[b])
        if key.startswith("optim."):
            assert (experts[masked] == 0).all()  # the weight is new: it has no history
            moments += 1
        else:
            both = masked[0] & masked[1]
            assert both.any() and (experts[0][both] != experts[1][both]).all()
            scale = experts[masked].square().mean().sqrt() / parent.square().mean().sqrt()
            assert 0.35 < scale < 0.65
            weights += 1
    assert (weights, moments) == (2 * 3, 2 * 3 * 2)


def test_weights_and_moments_have_one_mask_which_differs_by_matrix_layer_and_seed():
    (_, old), (_, new) = spawned(SpawnSettings(mask=MASK))
    masks = {key: experts == 0 for key, _, experts in families(old, new)}
    for key, mask in masks.items():
        if key.startswith("model."):
            assert mask.any()
            for moment in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(mask, masks[f"optim.{key.removeprefix('model.')}.{moment}"])
    gate = "model.layers.1.ffn.expert.w_gate.weight"
    assert not torch.equal(masks[gate], masks[gate.replace("gate", "up")])
    assert not torch.equal(masks[gate], masks[gate.replace("layers.1", "layers.2")])
    (_, old), (_, other) = spawned(SpawnSettings(mask=MASK), seed=1)
    assert not torch.equal(masks[gate], {key: experts == 0 for key, _, experts in families(old, other)}[gate])


def test_moments_start_from_zero_if_asked():
    (_, old), (_, new) = spawned(SpawnSettings(mask=MASK, moments="zero"))
    for key, parent, experts in families(old, new):
        assert (experts == 0).all() if key.startswith("optim.") else (experts == parent).any()


def test_everything_else_is_taken_over_and_the_router_is_new():
    (_, old), (_, new) = spawned(SpawnSettings())
    rest = {key for key in old if ".expert." not in key}
    assert any(".shared." in key for key in rest) and any(key.startswith("optim.") for key in rest)
    assert all(torch.equal(old[key], new[key]) for key in rest)
    fresh = build(deepseek(num_experts=4), one_expert=False)[1]
    added = {key for key in new if key not in old and ".experts." not in key}
    assert any(key == "model.layers.1.ffn.router.weight" for key in added)
    assert all(torch.equal(new[key], fresh[key]) for key in added)


@pytest.mark.parametrize("scenario", [deepseek, glam])
def test_equal_experts_with_weights_that_sum_to_one_are_the_parent(scenario):
    made = scenario()
    made.parts.router = lookup("router", "topk")(top_k=2, renormalise=True)
    made.parts.capacity = lookup("capacity", "none")()
    (before, _), (after, _) = spawned(SpawnSettings(mask=0.0), made)
    tokens = torch.arange(12).view(2, 6)
    outputs = [model.eval()(tokens, ForwardContext(batch_size=2, seq_len=6)) for model in (before, after)]
    assert_close(outputs[1], outputs[0], kind="layout")


@pytest.mark.parametrize(("after", "steps", "expected"), [(0.0, 10, None), (0.2, 50, 10), (0.29, 100, 29), (0.01, 10, 1), (0.99, 4, 4)])
def test_the_event_comes_after_a_part_of_the_steps_and_at_least_one(after, steps, expected):
    assert SpawnSettings(after=after).step(steps) == expected


def sections(*, steps=10, num_experts=4, mixer="residual", **spawn):
    kinds = {"router": dict(kind="topk", top_k=1), "capacity": dict(kind="none"), "parallel": dict(kind="single")}
    kinds |= {"objective": dict(kind="language_modeling"), "data": dict(kind="stdlib"), "schedule": dict(kind="constant")}
    kinds |= {"optim": dict(kind="adamw", lr=0.1), "mixer": dict(kind=mixer), "train": dict(steps=steps, global_batch_size=4)}
    model = dict(kind="glam", hidden_size=8, num_layers=2, num_heads=1, head_dim=8, num_experts=4, expert_width=8, dense_width=8)
    experts = dict(kind="ffn", num_experts=num_experts, width=8, spawn=spawn)
    return kinds | dict(run={}, model=model, experts=experts, checkpoint={}, metrics={}, logging={}, launch={})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(after=1.0), "experts.spawn.after = 1.0: must be >= 0 and < 1"),
        (dict(after=0.2, mask=1.0), "experts.spawn.mask = 1.0: must be >= 0 and < 1"),
        (dict(after=0.2, mask=-0.1), "experts.spawn.mask = -0.1: must be"),
        (dict(after=0.2, noise=-1.0), "experts.spawn.noise = -1.0: must be >= 0"),
        (dict(after=0.2, mask=0.0, noise=1.0), "experts.spawn.noise = 1.0: has no effect with experts.spawn.mask=0"),
        (dict(after=0.2, moments="keep"), "experts.spawn.moments = 'keep': must be one of: copy, zero"),
        (dict(after=0.99), "experts.spawn.after = 0.99: must leave the experts at least one step of train.steps (10)"),
        (dict(after=0.2, steps=1), "experts.spawn.after = 0.2: must leave the experts at least one step of train.steps (1)"),
        (dict(after=0.2, num_experts=1), "experts.num_experts = 1: must be >= 2 with experts.spawn.after"),
        (dict(after=0.2, mixer="momentum"), "mixer = 'momentum': must be residual with experts.spawn.after"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ConfigError) as error:
        load(Config, sections(**given))
    assert message in str(error.value)


def test_other_settings_are_free_without_the_event():
    assert load(Config, sections(mixer="momentum", steps=1, num_experts=1)).spawn_step() is None
