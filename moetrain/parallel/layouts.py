"""Parallel layouts as configuration: how many ranks shard, replicate and split matrices, and who owns the experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from moetrain.config import Component, setting
from moetrain.errors import Problem
from moetrain.registry import register

LayoutName = Literal["single", "fsdp", "ep"]


@dataclass(frozen=True)
class Layout:
    """replicate x shard x tensor ranks, neighbours in the tensor dimension. experts: sharded like dense parameters
    (fsdp), or owned whole, one owner per expert in each replica (ep), or by ``expert_tensor`` neighbours together.
    """

    name: LayoutName
    replicate: int
    shard: int
    tensor: int = 1
    expert_tensor: int = 1

    @property
    def data_world_size(self) -> int:
        """Ranks with different data: W in the scaling of losses and gradients."""
        return self.replicate * self.shard

    @property
    def world_size(self) -> int:
        return self.data_world_size * self.tensor


@dataclass(kw_only=True)
class ParallelConfig(Component):
    """Fields that all layouts share."""

    tensor: int = setting(1, doc="neighbouring ranks that split each dense matrix, the heads and the vocabulary", ge=1)
    expert_tensor: int = setting(1, doc="of these, ranks that split each expert; the others hold other experts", ge=1)
    replicate: int = setting(1, doc="replicas of the sharded state (HSDP); gradients are summed across them", ge=1)

    def check(self, path: str, *, world_size: int, num_experts: int) -> Iterable[Problem]:
        """What this layout requires of the number of ranks."""
        if self.tensor % self.expert_tensor:
            yield Problem(f"{path}.expert_tensor", self.expert_tensor, f"must divide {path}.tensor ({self.tensor})")
        if world_size % self.replicate:
            yield Problem(f"{path}.replicate", self.replicate, f"must divide the {world_size} ranks")
        elif world_size % (self.replicate * self.tensor):
            yield Problem(f"{path}.tensor", self.tensor, f"must divide the {world_size // self.replicate} ranks of each replica")

    def layout(self, name: LayoutName, world_size: int) -> Layout:
        """All ranks that neither replicate nor split matrices shard."""
        return Layout(name, self.replicate, world_size // (self.replicate * self.tensor), self.tensor, self.expert_tensor)

    def resolve(self, world_size: int) -> Layout:
        """The layout on this many ranks."""
        raise NotImplementedError


@register("parallel", "auto")
@dataclass(kw_only=True)
class AutoConfig(ParallelConfig):
    """One rank: single. Several: expert parallelism with FSDP2 for everything else."""

    def resolve(self, world_size: int) -> Layout:
        return Layout("single", 1, 1) if world_size == 1 else self.layout("ep", world_size)


@register("parallel", "single")
@dataclass(kw_only=True)
class SingleConfig(ParallelConfig):
    """One process, no communication."""

    def check(self, path: str, *, world_size: int, num_experts: int) -> Iterable[Problem]:
        yield from super().check(path, world_size=world_size, num_experts=num_experts)
        if world_size != 1:
            yield Problem(path, "single", f"runs on 1 rank, not on {world_size}; use auto, fsdp or ep")

    def resolve(self, world_size: int) -> Layout:
        return Layout("single", 1, 1)


@register("parallel", "fsdp", source="ZeRO-3 1910.02054, PyTorch FSDP2")
@dataclass(kw_only=True)
class FSDPConfig(ParallelConfig):
    """FSDP2 for all parameters, experts included: all weights move, no tokens move."""

    def check(self, path: str, *, world_size: int, num_experts: int) -> Iterable[Problem]:
        yield from super().check(path, world_size=world_size, num_experts=num_experts)
        if self.expert_tensor != 1:
            yield Problem(f"{path}.expert_tensor", self.expert_tensor, "must be 1: only experts with an owner (parallel=ep) are split")

    def resolve(self, world_size: int) -> Layout:
        return self.layout("fsdp", world_size)


@register("parallel", "ep", source="GShard 2006.16668")
@dataclass(kw_only=True)
class EPConfig(ParallelConfig):
    """Expert parallelism: each expert has one owner and tokens travel to it; FSDP2 for the dense parameters."""

    def resolve(self, world_size: int) -> Layout:
        return self.layout("ep", world_size)
