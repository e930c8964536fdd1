"""Replays the vectors ``comet``: the tree gate with and without permutations, Sinkhorn and assignment, DSelect-k."""

import math
import re

import pytest
import torch
from replay import context, dense_map

from moetrain.moe.losses.selectors import SelectorEntropyConfig, TrappedExpertsConfig
from moetrain.moe.routers.comet import CometRouterConfig, permutation_entropy
from moetrain.moe.routers.dselect import DSelectRouterConfig
from moetrain.ops.assignment import best_permutation, sinkhorn
from moetrain.ops.smooth_step import smooth_step
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "comet"
META, DATA = golden(SLUG)
T, E, K = META["T"], META["E"], META["K"]
ZERO = float(re.search(r"weight < ([\d.e-]*\d)", META["tensor_groups"]["identity.*"]).group(1))


def cotangent(shape):
    return torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).view(shape)


def tree(permutation):
    """The router with the stored parameters, and permutations [K, E, E] in place of learned ones."""
    config = CometRouterConfig(num_trees=K, width=META["gamma"], shifted_entropy=True, permutation_steps=0 if permutation is None else 1)
    made = config.build(META["D"], E, dtype=torch.float64)
    stack = lambda kind, nodes, part: torch.stack([DATA[f"{kind}.{n}.{part}"] for n in nodes], dim=1)  # noqa: E731
    splits, leaves = range(E - 1), range(E - 1, 2 * E - 1)
    state = {
        "split_weight": stack("split", splits, "weight"),
        "leaf_weight": stack("leaf", leaves, "weight"),
        "leaf_bias": stack("leaf", leaves, "bias"),
    }
    if permutation is not None:  # the state of a search that is over
        state["permutation.scores"] = torch.zeros(K, E, E)
        state["permutation.progress"] = torch.ones(())
        state["permutation.fixed"] = permutation.argmax(dim=2) + 1
    made.load_state_dict(state)
    return made


@pytest.mark.parametrize("name", ["identity", "permuted"], ids=lambda name: f"{SLUG}-{name}")
def test_tree_gate(name):
    made = tree(DATA["perm"] if name == "permuted" else None)
    x, ctx = DATA["x"].clone().requires_grad_(), context(T)
    routing = made(x, ctx)
    gates = dense_map(routing)[1]
    assert_close(gates, DATA[f"{name}.gates"], kind="golden")
    assert torch.equal(gates < ZERO, DATA[f"{name}.zero_mask"].bool())
    assert_close(gates.mean(dim=0), DATA[f"{name}.soft_average"], kind="golden")
    y = torch.einsum("te,teo->to", gates, DATA["expert_outputs"])
    assert_close(y, DATA[f"{name}.y"], kind="golden")
    entropy = META["entropy_reg"] * SelectorEntropyConfig().build()(routing, ctx)
    assert_close(entropy, DATA[f"{name}.entropy_reg"], kind="golden")
    ((y * cotangent(y.shape)).sum() + entropy).backward()
    assert_close(x.grad, DATA[f"{name}.grad_x"], kind="golden")
    assert_close(made.split_weight.grad[:, 0], DATA[f"{name}.grad_split0"], kind="golden")


def test_smooth_step():
    t = DATA["smoothstep.t"].clone().requires_grad_()
    s = smooth_step(t, META["gamma"])
    assert_close(s, DATA["smoothstep.s"], kind="golden")
    s.sum().backward()
    assert_close(t.grad, DATA["smoothstep.ds"], kind="golden")


@pytest.mark.parametrize("case", sorted(k.split(".")[1] for k in DATA if re.fullmatch(r"sinkhorn\.\d+\.P", k)), ids=lambda c: f"{SLUG}-{c}")
def test_permutations(case):
    temperature, iterations = re.search(rf"case {case} tau=([\d.e-]+\d) n=(\d+)", META["tensor_groups"]["sinkhorn.*"]).groups()
    matrices = sinkhorn(DATA["sinkhorn.log_weights"] / float(temperature), int(iterations))
    assert_close(matrices, DATA[f"sinkhorn.{case}.P"], kind="golden")
    assert_close(permutation_entropy(matrices), DATA[f"sinkhorn.{case}.entropy_reg"], kind="golden")
    best = torch.stack([best_permutation(matrix) for matrix in matrices])
    assert torch.equal(torch.nn.functional.one_hot(best, E).float(), DATA[f"sinkhorn.{case}.hard"])


def test_dselect():
    made = DSelectRouterConfig(num_selectors=K, width=META["gamma"]).build(META["D"], E, dtype=torch.float64)
    names = {"code_weight": "z_weight", "code_bias": "z_bias", "mixture_weight": "w_weight", "mixture_bias": "w_bias"}
    made.load_state_dict({ours: DATA[f"dselect.{theirs}"] for ours, theirs in names.items()})
    x, ctx = DATA["x"].clone().requires_grad_(), context(T)
    assert_close(made.selectors(x), DATA["dselect.selectors"], kind="golden")
    routing = made(x, ctx)
    gates = dense_map(routing)[1]
    assert_close(gates, DATA["dselect.gates"], kind="golden")
    # stored sums over tokens, ours are means
    entropy, trapped = (T * config().build()(routing, ctx) for config in (SelectorEntropyConfig, TrappedExpertsConfig))
    assert_close(entropy, DATA["dselect.entropy"], kind="golden")
    assert_close(trapped, DATA["dselect.unreachable_reg"], kind="golden")
    weight = float(re.search(r"([\d.]+)\*entropy", META["tensor_groups"]["dselect.*"]).group(1))
    ((gates * cotangent(gates.shape)).sum() + weight * entropy).backward()
    assert_close(x.grad, DATA["dselect.grad_x"], kind="golden")


def test_every_tensor_is_replayed():
    gate = {f"{n}.{p}" for n in ("identity", "permuted") for p in ("gates", "zero_mask", "soft_average", "y", "entropy_reg", "grad_x")}
    gate |= {"identity.grad_split0", "permuted.grad_split0", "x", "perm", "expert_outputs"}
    others = {name for name in DATA if name not in gate}
    assert {name.split(".")[0] for name in others} == {"split", "leaf", "smoothstep", "sinkhorn", "dselect"}
