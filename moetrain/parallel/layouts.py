"""Parallel layouts as configuration: how many ranks shard, replicate and split matrices, and who owns the experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from moetrain.config import Component, setting
from moetrain.errors import Problem
from moetrain.parallel.placement.cost import Transport
from moetrain.parallel.ranks import Ranks
from moetrain.registry import register

LayoutName = Literal["single", "fsdp", "ep", "zero3_experts", "fssdp_paper", "fssdp"]
ProfileUse = Literal["auto", "measure", "assume"]
Planner = Literal["owners_only", "everywhere", "sparse_materialization", "two_level"]


@dataclass(kw_only=True)
class FSSDPSettings:
    """Which experts are copied where, how copies travel, and how tokens are spread over them."""

    planner: Planner = setting("two_level", doc="chooses the copies of each step from the predicted loads")
    extra_slots: int = setting(2, doc="copies of experts that a rank has room for in each layer, beyond those that it owns", ge=0)
    overlap_degree: int | None = setting(
        None, doc="sparse_materialization: experts whose transfer the mixer hides; default: from the machine's profile", ge=0
    )
    split: Literal["quota", "even"] = setting("quota", doc="tokens over copies: quotas that balance ranks, or evenly after local copies")
    transport: Transport = setting("direct", doc="copies travel from owner to holders, once per node (two_stage), or by stripes")
    rematerialize: bool = setting(False, doc="free copies after the forward pass and fetch them again for the backward")
    accumulate: Literal["micro_batch", "step"] = setting(
        "micro_batch", doc="copies and their gradients travel in every micro-batch, or once per step (and stay in memory for all of it)"
    )
    calibrate: bool = setting(False, doc="once the router has chosen, more copies if that pays although nothing hides their transfer")
    prediction: Literal["window", "exponential", "last"] = setting(
        "window", doc="of loads: mean of the last steps, decaying mean, last step"
    )
    window: int = setting(5, doc="steps of the sliding window [2502.02581 section 4.2]", ge=1)
    decay: float = setting(0.8, doc="weight of the past in the exponential prediction", gt=0, lt=1)
    reshard_every: int = setting(0, doc="steps between new choices of owners by heterogeneous sharding; 0: never", ge=0)


@dataclass(frozen=True)
class Layout:
    """replicate x shard x tensor ranks, neighbours in the tensor dimension. Experts: sharded like dense parameters
    (fsdp), or owned whole, one owner per expert in each replica, with the copies that a planner chooses. What owns an
    expert, or holds a copy, are ``expert_tensor`` neighbours together.

    ranks_per_node: None takes the launcher's. degree: chunks in which tokens travel; None: as the profile of the machine
    advises. deduplicate: each token crosses to a node once. timeout_seconds: of collectives.
    """

    name: LayoutName
    replicate: int
    shard: int
    fssdp: FSSDPSettings = field(default_factory=lambda: FSSDPSettings(planner="owners_only"))
    ranks_per_node: int | None = None
    degree: int | None = None
    deduplicate: bool = False
    profile: ProfileUse = "auto"
    timeout_seconds: float = 600.0
    tensor: int = 1
    expert_tensor: int = 1

    @property
    def data_world_size(self) -> int:
        """Ranks with different data: W in the scaling of losses and gradients."""
        return self.replicate * self.shard

    @property
    def world_size(self) -> int:
        return self.data_world_size * self.tensor

    @property
    def expert_ranks(self) -> int:
        """Owners of experts in each replica: ranks, or groups of ranks that share their experts."""
        return self.shard * self.tensor // self.expert_tensor

    def tensor_groups(self) -> list[list[int]]:
        """Global ranks that split matrices together and see the same data."""
        return [list(range(first, first + self.tensor)) for first in range(0, self.world_size, self.tensor)]

    def data_groups(self) -> list[list[int]]:
        """Global ranks that hold the same parts of matrices (before sharding) and see different data."""
        return [list(range(first, self.world_size, self.tensor)) for first in range(self.tensor)]

    def expert_groups(self) -> list[list[int]]:
        """Global ranks among which the experts of one replica, or one part of each of them, are spread."""
        size, step = self.shard * self.tensor, self.expert_tensor
        return [list(range(first + part, first + size, step)) for first in range(0, self.world_size, size) for part in range(step)]

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

    tensor: int = setting(1, doc="neighbouring ranks that split each dense matrix, the heads and the vocabulary", ge=1)
    expert_tensor: int = setting(1, doc="of these, neighbours that split each expert; the others hold other experts", ge=1)
    replicate: int = setting(1, doc="replicas of the sharded state (HSDP); gradients are summed across them", ge=1)
    nodes: int | None = setting(
        None, doc="nodes that the ranks are on, equally many on each; default: as torchrun or SLURM started them", ge=1
    )

    def check(self, path: str, *, world_size: int, num_experts: int) -> Iterable[Problem]:
        """What this layout requires of the number of ranks."""
        if self.tensor % self.expert_tensor:
            yield Problem(f"{path}.expert_tensor", self.expert_tensor, f"must divide {path}.tensor ({self.tensor})")
        if world_size % self.replicate:
            yield Problem(f"{path}.replicate", self.replicate, f"must divide the {world_size} ranks")
        elif world_size % (self.replicate * self.tensor):
            yield Problem(f"{path}.tensor", self.tensor, f"must divide the {world_size // self.replicate} ranks of each replica")
        if self.nodes is not None and world_size % self.nodes:
            yield Problem(f"{path}.nodes", self.nodes, f"must divide the {world_size} ranks")

    def resolve(self, world_size: int, *, timeout_seconds: float = 600.0) -> Layout:
        """The layout on this many ranks."""
        return Layout(
            self.layout_name(world_size),
            self.replicate,
            world_size // (self.replicate * self.tensor),
            fssdp=self.placement(),
            ranks_per_node=None if self.nodes is None else world_size // self.nodes,
            degree=getattr(self, "degree", None),
            deduplicate=getattr(self, "deduplicate", False),
            profile=getattr(self, "profile", "auto"),
            timeout_seconds=timeout_seconds,
            tensor=self.tensor,
            expert_tensor=self.expert_tensor,
        )

    def layout_name(self, world_size: int) -> LayoutName:
        """Which layout this is on so many ranks."""
        raise NotImplementedError

    def placement(self) -> FSSDPSettings:
        """How experts are placed, if they are."""
        return FSSDPSettings(planner="owners_only")


@register("parallel", "single")
@dataclass(kw_only=True)
class SingleConfig(ParallelConfig):
    """One process, no communication."""

    def check(self, path: str, *, world_size: int, num_experts: int) -> Iterable[Problem]:
        yield from super().check(path, world_size=world_size, num_experts=num_experts)
        if world_size != 1:
            yield Problem(path, "single", f"runs on 1 rank, not on {world_size}; use another layout")

    def layout_name(self, world_size: int) -> LayoutName:
        return "single"


@register("parallel", "fsdp", source="ZeRO-3 1910.02054, PyTorch FSDP2")
@dataclass(kw_only=True)
class FSDPConfig(ParallelConfig):
    """FSDP2 for all parameters, experts included: all weights move, no tokens move."""

    def check(self, path: str, *, world_size: int, num_experts: int) -> Iterable[Problem]:
        yield from super().check(path, world_size=world_size, num_experts=num_experts)
        if self.expert_tensor != 1:
            yield Problem(f"{path}.expert_tensor", self.expert_tensor, "must be 1: only experts that have owners are split")

    def layout_name(self, world_size: int) -> LayoutName:
        return "fsdp"


@dataclass(kw_only=True)
class PlacedConfig(ParallelConfig):
    """Layouts in which whole experts have owners; FSDP2 for everything else."""

    degree: int | None = setting(
        None,
        doc="chunks in which tokens travel, so that one is computed while others are under way; default: as the profile says, else 1",
        ge=1,
    )
    deduplicate: bool = setting(False, doc="a token with several experts on one node crosses to that node once")
    profile: ProfileUse = setting(
        "auto", doc="costs for planners. auto: what `moetrain bench profile` measured, else assumed; measure: measured now if need be"
    )

    def check(self, path: str, *, world_size: int, num_experts: int) -> Iterable[Problem]:
        yield from super().check(path, world_size=world_size, num_experts=num_experts)
        if self.deduplicate and self.degree not in (None, 1):
            yield Problem(f"{path}.degree", self.degree, f"must be 1 with {path}.deduplicate: tokens in two hops are not cut into chunks")


@register("parallel", "ep", source="GShard 2006.16668")
@dataclass(kw_only=True)
class EPConfig(PlacedConfig):
    """Expert parallelism: each expert has one owner and tokens travel to it."""

    def layout_name(self, world_size: int) -> LayoutName:
        return "ep"


@register("parallel", "auto")
@dataclass(kw_only=True)
class AutoConfig(PlacedConfig):
    """One rank: single. Several: expert parallelism with FSDP2 for everything else."""

    def layout_name(self, world_size: int) -> LayoutName:
        return "single" if world_size == 1 else "ep"


@register("parallel", "zero3_experts", source="ZeRO-3 1910.02054")
@dataclass(kw_only=True)
class ZeRO3ExpertsConfig(PlacedConfig):
    """Every rank gets a copy of every expert for the time of its layer, and no token moves."""

    rematerialize: bool = setting(True, doc="free copies after the forward pass and fetch them again for the backward")
    transport: Transport = setting("direct", doc="copies travel from owner to holders, once per node (two_stage), or by stripes")

    def layout_name(self, world_size: int) -> LayoutName:
        return "zero3_experts"

    def placement(self) -> FSSDPSettings:
        return FSSDPSettings(planner="everywhere", split="even", rematerialize=self.rematerialize, transport=self.transport)


@register("parallel", "fssdp", source="Hecate 2502.02581")
@dataclass(kw_only=True)
class FSSDPConfig(PlacedConfig):
    """Fully sharded sparse data parallelism: owners as in ep, and short-lived copies of hot experts. Two-level planner."""

    fssdp: FSSDPSettings = setting(default_factory=FSSDPSettings, doc="copies of experts")

    def check(self, path: str, *, world_size: int, num_experts: int) -> Iterable[Problem]:
        yield from super().check(path, world_size=world_size, num_experts=num_experts)
        foreign = num_experts - num_experts // max(1, world_size // (self.replicate * self.expert_tensor))
        if self.fssdp.extra_slots > foreign:
            yield Problem(
                f"{path}.fssdp.extra_slots", self.fssdp.extra_slots, f"must be <= {foreign}, the experts that a rank does not own"
            )

        if self.fssdp.accumulate == "step" and self.fssdp.rematerialize:
            yield Problem(f"{path}.fssdp.accumulate", "step", f"keeps copies for the whole step: needs {path}.fssdp.rematerialize=false")

    def layout_name(self, world_size: int) -> LayoutName:
        return "fssdp"

    def placement(self) -> FSSDPSettings:
        return self.fssdp


@register("parallel", "fssdp_paper", source="Hecate 2502.02581")
@dataclass(kw_only=True)
class FSSDPPaperConfig(FSSDPConfig):
    """As fssdp, with the paper's own rules: sparse materialisation (Algorithm 1), even split, re-sharding (Algorithm 2)."""

    fssdp: FSSDPSettings = setting(
        default_factory=lambda: FSSDPSettings(planner="sparse_materialization", split="even", reshard_every=100), doc="copies of experts"
    )

    def layout_name(self, world_size: int) -> LayoutName:
        return "fssdp_paper"
