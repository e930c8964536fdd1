"""Moving ownership of experts between ranks: parameters and optimizer state, between two steps, as one transaction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moetrain.parallel.collectives import Peers, count_traffic, start_all_to_all
from moetrain.parallel.parallelize import ParallelModel
from moetrain.parallel.placement.plan import Integers, PlacementPlan


def reshard(placed: ParallelModel, optimizer: torch.optim.Optimizer, step: int) -> int:
    """After ``step`` steps: new owners, if the layout asks for them now. Collective; returns how many experts have moved."""
    every = placed.layout.fssdp.reshard_every
    if not (placed.schedulers and every and step % every == 0):
        return 0
    return move_owners(placed, optimizer, placed.new_owners())


def restore_placement(placed: ParallelModel, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take over the owners and load histories of a checkpoint that this layout has written for as many owners; under any
    other, experts stay where they are and histories begin anew."""
    if (state.get("layout"), state.get("ranks")) != (placed.layout.name, placed.layout.expert_ranks):
        return
    move_owners(placed, optimizer, {name: layer["owner"] for name, layer in state["layers"].items()})
    for name, scheduler in placed.schedulers.items():
        scheduler.load_state(state["layers"][name])
    placed.loads.load_state(state["loads"])


@torch.no_grad()
def move_owners(placed: ParallelModel, optimizer: torch.optim.Optimizer, owners: Mapping[str, Integers | list[int]]) -> int:
    """Give experts new owners. owners: MoE layer -> [E] rank within the expert group; the same on every rank.

    Moves each expert's parameters together with every optimizer tensor of their shape. Gradients are dropped. Collective;
    returns how many experts have moved.
    """
    moved = 0
    for name, executor in placed.executors().items():
        old, new = executor.plan.owner, np.asarray(owners[name], dtype=np.int64)
        if np.array_equal(old, new):
            continue
        moved += int((old != new).sum())
        experts, peers = placed.model.moe_layers()[name].experts, executor.links.tokens
        parameters = dict(experts.named_parameters())
        states = {key: optimizer.state[p] for key, p in parameters.items()}
        moments = {key: [k for k, v in states[key].items() if v.shape == p.shape] for key, p in parameters.items()}
        stacks = [t for key, p in parameters.items() for t in (p.detach(), *(states[key][k] for k in moments[key]))]
        rows = iter(exchange_rows(stacks, old, new, peers))
        experts.hold(np.flatnonzero(new == peers.rank).tolist())
        for key, previous in parameters.items():
            parameter = nn.Parameter(next(rows), requires_grad=previous.requires_grad)
            setattr(experts, key, parameter)
            state = optimizer.state.pop(previous)
            optimizer.state[parameter] = {k: next(rows) if k in moments[key] else v for k, v in state.items()}
            for group in optimizer.param_groups:
                group["params"] = [parameter if p is previous else p for p in group["params"]]
        executor.plan = PlacementPlan.owners_only(new, peers.size)
        placed.schedulers[name].owner = new
    return moved


def exchange_rows(stacks: list[Tensor], old: Integers, new: Integers, peers: Peers) -> list[Tensor]:
    """The rows of stacked tensors [owned experts, ...] under new owners; experts of a rank are ordered by id."""
    rank, ranks = peers.rank, peers.size
    mine = np.flatnonzero(old == rank)
    order = np.argsort(new[mine], kind="stable")
    send = np.bincount(new[mine], minlength=ranks).tolist()
    target = np.flatnonzero(new == rank)
    receive = np.bincount(old[target], minlength=ranks).tolist()
    flat = torch.cat([t.flatten(1) for t in stacks], dim=1)[torch.from_numpy(order).to(stacks[0].device)]
    count_traffic("reshard", [n * flat.shape[1] * flat.element_size() for n in send], peers)
    arrived = start_all_to_all(flat, send, receive, peers, "reshard").wait()
    arrival = target[np.argsort(old[target], kind="stable")]  # by previous owner, then id
    arrived = arrived[torch.from_numpy(np.argsort(arrival)).to(arrived.device)]
    sizes = [t.shape[1:].numel() for t in stacks]
    return [part.unflatten(1, t.shape[1:]).contiguous() for part, t in zip(arrived.split(sizes, dim=1), stacks, strict=True)]
