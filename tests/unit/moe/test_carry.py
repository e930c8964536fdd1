"""State that travels from MoE layer to MoE layer is all that a later part of a model needs from an earlier one.

The stack is cut in two, as a pipeline would: output and carried state go to the second part, their gradients come back.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from moetrain.moe.capacity.policies import DroplessConfig
from moetrain.moe.context import ForwardContext
from moetrain.moe.experts.ffn import FFNExpertsConfig
from moetrain.moe.layer import MoELayer, MoEParts
from moetrain.moe.losses.z import ZLossConfig
from moetrain.moe.routers.base import tie_routers
from moetrain.registry import lookup
from moetrain.testing import assert_close

B, S, D, E, LAYERS = 2, 5, 6, 4, 4

CARRIED: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "recurrent": ("recurrent_topk", {"state_size": 3}, "residual", {}),
    "gating residuals": ("residual_topk", {}, "residual", {}),
    "momentum": ("topk", {}, "momentum", {"mu": 0.7}),
    "adam": ("topk", {}, "adam", {"mu": 0.5}),
    "robust momentum": ("topk", {}, "robust_momentum", {"rate": 0.7}),
}


def make(name: str) -> list[MoELayer]:
    router, settings, mixer, mixer_settings = CARRIED[name]
    parts = MoEParts(
        router=lookup("router", router)(top_k=2, **settings),
        experts=FFNExpertsConfig(num_experts=E, width=3),
        capacity=DroplessConfig(),
        loss={"z": ZLossConfig(coefficient=0.1)},
        mixer=lookup("mixer", mixer)(**mixer_settings),
    )
    layers = [parts.build(D, dtype=torch.float64) for _ in range(LAYERS)]
    tie_routers(layer.router for layer in layers)
    generator = torch.Generator().manual_seed(0)
    for parameter in nn.ModuleList(layers).parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return layers


def context() -> ForwardContext:
    return ForwardContext(batch_size=B, seq_len=S, training=True)


def run(layers: list[MoELayer], x: Tensor, ctx: ForwardContext, first: int = 0) -> Tensor:
    for i, layer in enumerate(layers, start=first):
        at = ctx.at(f"layers.{i}")
        x = layer.mixer(x, layer(layer.mixer.look_ahead(x, at), at), at)
    return x


def gradients(layers: list[MoELayer]) -> dict[str, Tensor]:
    return {name: p.grad for name, p in nn.ModuleList(layers).named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CARRIED)
def test_a_cut_stack_has_the_outputs_and_gradients_of_the_whole(name: str) -> None:
    x = torch.randn(B, S, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole, ctx = make(name), context()
    expected = run(whole, x, ctx)
    (expected.square().sum() + ctx.losses["z"]).backward()

    cut, first, second = make(name), context(), context()
    sent = run(cut[:2], x, first)
    assert first.carry
    leaf = lambda value: value.detach().requires_grad_() if isinstance(value, Tensor) else value  # noqa: E731
    received, second.carry = leaf(sent), tree_map(leaf, first.carry)
    arrived = dict(second.carry)  # entries are replaced
    y = run(cut[2:], received, second, first=2)
    assert_close(y, expected, "exact")
    (y.square().sum() + second.losses["z"]).backward()
    pairs = [(sent, received), *zip(tree_flatten(first.carry)[0], tree_flatten(arrived)[0], strict=True)]
    back = [(out, leaf.grad) for out, leaf in pairs if isinstance(out, Tensor) and out.requires_grad and leaf.grad is not None]
    assert len(back) > 1
    torch.autograd.backward([first.losses["z"], *(out for out, _ in back)], [None, *(grad for _, grad in back)])
    assert_close(gradients(cut), gradients(whole), "layout")
