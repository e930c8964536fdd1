"""Boundary events: what changes the structure of the model, between two optimizer steps, on all ranks at once.

An event is a function of a checkpointed state: nothing is written while it happens, and a run that dies in it meets it
again when it goes on. Checkpoints list the events that they have behind them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.models.common.init import Normal, draw
from moetrain.moe.experts import SpawnSettings
from moetrain.parallel.parallelize import local, write
from moetrain.train.settings import Config

SPAWN = "spawn_experts"

EXPERT_KEY = re.compile(r"(model|optim)\.(?P<layer>.+)\.experts\.(?P<expert>\d+)\.(?P<tensor>\w+)(?P<moment>\.\w+)?")


def spawned_after(events: Sequence[Mapping[str, Any]]) -> int | None:
    """Steps that were done when experts were spawned; None if they have not been."""
    return next((event["step"] for event in events if event["name"] == SPAWN), None)


def has_one_expert(config: Config, events: Sequence[Mapping[str, Any]]) -> bool:
    """Whether experts are still to be spawned, given the events that have happened."""
    return config.spawn_step() is not None and spawned_after(events) is None


@torch.no_grad()
def spawn_experts(old: Mapping[str, Tensor], new: Mapping[str, Tensor], settings: SpawnSettings, *, seed: int) -> None:
    """Fill the state of a model with experts from that of the same model with one FFN in their place (EvoMoE 2112.14397).

    old, new: this rank's parts by logical key, under the same layout. What both have is copied. Each expert is a copy of
    the FFN but for masked weights, drawn by run seed, layer, expert and matrix, and so the same under any layout. What
    else is new, the router above all, stays as it is. Collective.
    """
    children: dict[str, list[str]] = {}
    for key in new.keys() - old.keys():
        if found := EXPERT_KEY.fullmatch(key):
            origin = f"{found[1]}.{found['layer']}.expert.{found['tensor']}.weight{found['moment'] or ''}"
            children.setdefault(origin, []).append(key)
    # in the order of the old keys, the same on every rank: all ranks gather a parent together
    for key, tensor in old.items():
        if key in new:
            local(new[key]).copy_(local(tensor))
            continue
        parent = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for child in children.pop(key, ()):
            write(new[child], inherit(child, parent, settings, seed=seed))
    assert not children, f"no parent of {children}"


def inherit(key: str, parent: Tensor, settings: SpawnSettings, *, seed: int) -> Tensor:
    """The value of an expert's tensor. key: its logical key. parent: the FFN's tensor, on every device the same bits."""
    found = EXPERT_KEY.fullmatch(key)
    assert found is not None
    if found["moment"] and settings.moments == "zero":
        return torch.zeros_like(parent)
    name = f"{found['layer']}.experts.{found['expert']}.{found['tensor']}"
    chance = draw(f"{name}.mask", parent.shape, uniform, seed=seed, dtype=torch.float32)
    masked = torch.zeros(parent.shape, dtype=parent.dtype)
    if settings.noise and not found["moment"]:
        scale = parent.square().mean().sqrt().item()
        masked = draw(f"{name}.noise", parent.shape, Normal(settings.noise * scale), seed=seed, dtype=parent.dtype)
    return torch.where(chance.to(parent.device) < settings.mask, masked.to(parent.device), parent)


def uniform(tensor: Tensor, generator: torch.Generator) -> None:
    """U(0, 1)."""
    tensor.uniform_(generator=generator)
