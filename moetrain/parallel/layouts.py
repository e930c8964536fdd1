"""Parallel layouts as configuration: how many ranks shard, how many replicate, and who owns the experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from moetrain.config import Component, setting
from moetrain.errors import Problem
from moetrain.parallel.ranks import Ranks
from moetrain.parallel.transport import Transport
from moetrain.registry import register

LayoutName = Literal["single", "fsdp", "ep", "zero3_experts", "fssdp", "fssdp_paper"]
Planner = Literal["owners_only", "everywhere", "sparse_materialization", "two_level"]


@dataclass(kw_only=True)
class FSSDPSettings:
    """How copies of experts are chosen, moved and used."""

    planner: Planner = setting("two_level", doc="which experts are copied to which ranks")
    extra_slots: int = setting(2, doc="copies of experts that a rank has room for per layer, beyond those it owns", ge=0)
    split: Literal["quota", "even"] = setting("quota", doc="tokens over the copies: balanced by quotas, or evenly with local copies first")
    transport: Transport = setting("direct", doc="how copies travel: from the owner to each holder, once per node, or striped over a node")
    rematerialize: bool = setting(False, doc="free copies after the forward pass and fetch them again for the backward")
    reshard_every: int = setting(0, doc="steps between new choices of owners (heterogeneous sharding); 0: never", ge=0)
    degree: int = setting(1, doc="chunks in which tokens travel, so that one is computed while others are under way", ge=1)


@dataclass(frozen=True)
class Layout:
    """replicate x shard ranks. Experts: sharded like dense parameters (fsdp), or owned whole, one owner per expert in
    each replica, with copies as the planner says.

    ranks_per_node: None takes the launcher's. timeout_seconds: of collectives.
    """

    name: LayoutName
    replicate: int
    shard: int
    fssdp: FSSDPSettings = field(default_factory=lambda: FSSDPSettings(planner="owners_only"))
    ranks_per_node: int | None = None
    timeout_seconds: float = 600.0

    @property
    def world_size(self) -> int:
        return self.replicate * self.shard

    @property
    def places_experts(self) -> bool:
        """Whether whole experts have owners."""
        return self.name not in ("single", "fsdp")

    def nodes_of(self, ranks: Sequence[int], here: Ranks) -> tuple[int, ...]:
        """Node of each of these global ranks, numbered from 0 in the order of their first appearance."""
        per_node = self.ranks_per_node or here.local_world_size
        numbers: dict[int, int] = {}
        return tuple(numbers.setdefault(rank // per_node, len(numbers)) for rank in ranks)


@dataclass(kw_only=True)
class ParallelConfig(Component):
    """Fields that all layouts share."""

    tensor: int = setting(1, doc="ranks that split each matrix", ge=1)
    replicate: int = setting(1, doc="replicas of the sharded state (HSDP); gradients are summed across them", ge=1)

    def check(self, path: str, *, world_size: int, num_experts: int) -> Iterable[Problem]:
        """What this layout requires of the number of ranks."""
        if self.tensor != 1:
            yield Problem(f"{path}.tensor", self.tensor, "must be 1: tensor parallelism is not available in this version")
        if world_size % self.replicate:
            yield Problem(f"{path}.replicate", self.replicate, f"must divide the {world_size} ranks")

    def resolve(self, world_size: int) -> Layout:
        """The layout on this many ranks."""
        raise NotImplementedError


@register("parallel", "auto")
@dataclass(kw_only=True)
class AutoConfig(ParallelConfig):
    """One rank: single. Several: expert parallelism with FSDP2 for everything else."""

    def resolve(self, world_size: int) -> Layout:
        return Layout("single", 1, 1) if world_size == 1 else Layout("ep", self.replicate, world_size // self.replicate)


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

    def resolve(self, world_size: int) -> Layout:
        return Layout("fsdp", self.replicate, world_size // self.replicate)


@register("parallel", "ep", source="GShard 2006.16668")
@dataclass(kw_only=True)
class EPConfig(ParallelConfig):
    """Expert parallelism: each expert has one owner and tokens travel to it; FSDP2 for the dense parameters."""

    def resolve(self, world_size: int) -> Layout:
        return Layout("ep", self.replicate, world_size // self.replicate)
