"""Puts a single-device model on ranks: ownership of experts, sharding of the rest, materialisation, initial weights.

The order is the same for every model: narrow experts to their owners, split matrices, activation checkpointing,
FSDP2, allocate from meta, initialise. ``ParallelModel`` then answers all questions that depend on the layout: which parameters are
experts, what a rank's part of the checkpoint is, how gradients become global ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moetrain.models.common.decoder import Decoder
from moetrain.models.common.init import Constant, Init, draw
from moetrain.moe.context import LayerStatistics, LocalReducer, Reducer
from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoELayer
from moetrain.moe.routers import Router
from moetrain.parallel.collectives import GroupReducer, Peers
from moetrain.parallel.dense import SlicedExecutor, split_dense, sum_in_place
from moetrain.parallel.executor import Links, PlacedExecutor
from moetrain.parallel.layouts import Layout
from moetrain.parallel.placement.dispatch import split_even, split_quota
from moetrain.parallel.placement.plan import Integers
from moetrain.parallel.placement.planners import even_sharding, heterogeneous_sharding
from moetrain.parallel.placement.predict import SlidingWindow
from moetrain.parallel.placement.scheduler import LayerFigures, LayerScheduler
from moetrain.parallel.profile import MachineProfile
from moetrain.parallel.ranks import Ranks
from moetrain.parallel.scheduling import (
    describe_cluster,
    layer_cost,
    machine_profile,
    make_calibration,
    make_planner,
    make_predictor,
    overlap_degree,
    pipeline_degree,
)
from moetrain.parallel.transport import new_peers


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def write(tensor: Tensor, value: Tensor) -> None:
    """Put a value, whole and the same on every rank, into a tensor of which this rank may hold a part."""
    value = value.to(tensor.device)
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
    local(tensor).copy_(value)


@dataclass
class ParallelModel:
    """A model in its layout.

    owned: names of the expert parameters of which each rank holds its own rows as plain tensors (ep); all other
    parameters are DTensors, or plain on one process. partial: names of those that all ranks of a tensor group hold
    alike, each with its own part of the gradient. Process groups, None on one process: world, data (ranks with different
    data that hold the same parts of matrices), replicas; tensor, None without tensor parallelism. expert_parts: mesh of
    the ranks that share each owned expert, None if experts are whole. schedulers: plans of placed experts, by MoE layer.
    """

    model: Decoder
    layout: Layout
    device: torch.device
    owned: frozenset[str]
    partial: frozenset[str] = frozenset()
    world: dist.ProcessGroup | None = None
    data: dist.ProcessGroup | None = None
    replicas: dist.ProcessGroup | None = None
    tensor: dist.ProcessGroup | None = None
    expert_parts: DeviceMesh | None = None
    schedulers: dict[str, LayerScheduler] = field(default_factory=dict)
    overlap_degree: int = 0
    loads: SlidingWindow = field(default_factory=SlidingWindow)
    """Global loads [L, E] of the last steps, from which owners are chosen."""

    def begin_step(self) -> None:
        """Choose the copies of the next step."""
        executors = self.executors()
        for name, scheduler in self.schedulers.items():
            executors[name].plan = scheduler.plan()

    def end_step(self, statistics: Mapping[str, LayerStatistics]) -> dict[str, LayerFigures]:
        """Take the loads of a step into the histories. statistics: of all ranks, on the host. Returns figures by MoE layer."""
        figures = {}
        for name, executor in self.executors().items():
            seen = executor.take_observation()
            if seen is not None:
                figures[name] = self.schedulers[name].observe(seen, executor.plan)
        if self.schedulers:
            layers = self.model.moe_layers()
            loads = [statistics[name].dispatched[: layers[name].experts.num_experts].numpy() for name in self.schedulers]
            self.loads.push(np.stack(loads))
        return figures

    def new_owners(self) -> dict[str, Integers]:
        """Owners by heterogeneous sharding (Hecate's Algorithm 2) from the loads of the last steps."""
        loads = self.loads.predict()
        if loads is None:
            return {name: scheduler.owner for name, scheduler in self.schedulers.items()}
        current = np.stack([scheduler.owner for scheduler in self.schedulers.values()])
        cluster = next(iter(self.executors().values())).links.cluster
        owners = heterogeneous_sharding(loads, cluster, self.overlap_degree, current)
        return dict(zip(self.schedulers, owners, strict=True))

    def placement_state(self) -> dict[str, Any]:
        """Owners and load histories as JSON values: with them a resumed run plans as the interrupted one would have."""
        if not self.schedulers:
            return {}
        layers = {name: scheduler.state() for name, scheduler in self.schedulers.items()}
        return {"layout": self.layout.name, "ranks": self.layout.expert_ranks, "layers": layers, "loads": self.loads.state()}

    def executors(self) -> dict[str, PlacedExecutor]:
        """Executors that place experts, by the name of their MoE layer."""
        executors = {name: layer.executor for name, layer in self.model.moe_layers().items()}
        inner = {name: executor.inner if isinstance(executor, SlicedExecutor) else executor for name, executor in executors.items()}
        return {name: executor for name, executor in inner.items() if isinstance(executor, PlacedExecutor)}

    @property
    def reducer(self) -> Reducer:
        return LocalReducer() if self.data is None else GroupReducer(self.data)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable parameters by name."""
        return self.model.named_parameters()

    def reshard(self) -> None:
        """Put sharded parameters back in place: FSDP leaves the root's gathered after a forward without backward."""
        if self.world is not None:
            from torch.distributed.fsdp import FSDPModule

            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """After the last backward of a step: FSDP has averaged its gradients over the data-parallel world; owned expert
        gradients are sums over their group, copies included, and get the same divisor. Parts of tensor ranks are summed."""
        executors = self.executors().values()
        for executor in executors:
            executor.post_gradients()
        for executor in executors:
            executor.add_gradients()
        for name, parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if name in self.owned:
                if self.layout.replicate > 1:
                    dist.all_reduce(parameter.grad, group=self.replicas)
                parameter.grad /= self.layout.data_world_size
        if self.tensor is not None:
            sum_in_place([local(p.grad) for name, p in self.parameters() if name in self.partial and p.grad is not None], self.tensor)
        for router in self.frozen_routers():
            for parameter in router.parameters():
                parameter.grad = None  # the optimizer passes it over: neither decay nor momentum moves it

    def frozen_routers(self) -> list[Router]:
        """Routers whose parameters stay as they are in this step."""
        return [layer.router for layer in self.model.moe_layers().values() if layer.router.frozen]

    @torch.no_grad()
    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Scale all gradients so that their global norm is at most max_norm (None: only measure); returns the norm before.

        Each parameter counts once: shards are disjoint, what replicas hold in common is divided by their number, and what
        tensor ranks hold in common counts on the first of them.
        """
        gradients = {name: local(p.grad) for name, p in self.parameters() if p.grad is not None}
        repeated = self.partial if self.tensor is not None and self.tensor.rank() else ()
        counted = [g for name, g in gradients.items() if g.numel() and name not in repeated]
        squares = [norm.double().square() for norm in torch._foreach_norm(counted)]
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=self.device)
        if self.world is not None:
            dist.all_reduce(total, group=self.world)
            total /= self.layout.replicate
        norm = total.sqrt()
        if max_norm is not None and norm > max_norm:
            torch._foreach_mul_(list(gradients.values()), float(max_norm / norm))
        return norm

    def logical(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The logical tensors that a parameter (or anything of its shape, e.g. a moment) stands for on this rank.

        One key per dense parameter; for stacked expert parameters one key per held expert, as views (DTensors if other
        ranks hold the rest of the expert).
        """
        owner, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if not isinstance(module, Experts):
            yield name, tensor
            return
        rows = local(tensor).detach()
        for logical, parameter, row, part in module.logical():
            if parameter == attribute:
                held = rows[row, part.start : part.stop]
                if self.expert_parts is not None:
                    held = DTensor.from_local(held, self.expert_parts, [Shard(part.split_dim)], run_check=False)
                yield f"{owner}.{logical}", held

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Initial weights, the same for every layout; buffers are zero unless their router says otherwise."""
        for name, parameter in self.parameters():
            for logical, tensor in self.logical(name, parameter):
                init = find_init(self.model, logical)
                dtype = tensor.dtype
                write(tensor, draw(logical, tuple(tensor.shape), init, seed=seed, dtype=dtype))
        for name, buffer in self.model.named_buffers():
            init = find_init(self.model, name) if is_fixed(self.model, name) else router_init(self.model, name) or Constant(0.0)
            buffer.copy_(draw(name, buffer.shape, init, seed=seed, dtype=buffer.dtype))


def router_init(model: Decoder, name: str) -> Init | None:
    """How a tensor starts if it is one of which its router says so."""
    for layer, moe in model.moe_layers().items():
        attribute = name.removeprefix(f"{layer}.router.")
        if attribute != name and attribute in moe.router.initial:
            init = moe.router.initial[attribute]
            return init if callable(init) else Constant(init)
    return None


def is_fixed(model: Decoder, name: str) -> bool:
    """Whether a buffer is a router's parameter that is not trained. Shared submodules have their names below ``tied.router``."""
    for layer, moe in model.moe_layers().items():
        for prefix in (f"{layer}.router.", "tied.router."):
            if name.startswith(prefix) and name.removeprefix(prefix) in moe.router.fixed:
                return True
    return False


def find_init(model: Decoder, name: str) -> Init:
    """The initialiser of a logical tensor: what its router says, else the first of the model's patterns that matches."""
    own = router_init(model, name)
    if own is not None:
        return own
    for pattern, init in model.init.items():
        if fnmatchcase(name, pattern):
            return init
    raise KeyError(f"no initialiser for {name}")


def parallelize(
    model: Decoder,
    layout: Layout,
    ranks: Ranks,
    *,
    device: torch.device,
    recompute: bool = False,
    tokens_per_pass: int = 0,
    profile: MachineProfile | None = None,
) -> ParallelModel:
    """Place a model that was built on the meta device; its weights are allocated but not initialised.

    recompute: activation checkpointing of every block. tokens_per_pass: of a rank's forward pass, for the cost model.
    profile: costs of the machine, the same on every rank; None: as the layout says.
    Collective if the layout has several ranks; the default process group must exist.
    """
    for block in model.layers:
        block.recompute = recompute  # type: ignore[assignment]
    if layout.world_size == 1:
        model.to_empty(device=device)
        return ParallelModel(model, layout, device, frozenset())

    mesh = init_device_mesh(device.type, (layout.replicate, layout.shard, layout.tensor), mesh_dim_names=("replicate", "shard", "tensor"))
    placement: dict[str, Any] = {}
    families = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    owned: frozenset[str] = frozenset()
    if layout.places_experts and families:
        owned = frozenset(f"{name}.{parameter}" for name, module in families.items() for parameter, _ in module.named_parameters())
        profile = profile or machine_profile(layout, ranks, device, model.compute_dtype)
        placement = place_experts(model, layout, connect(layout, ranks, device, profile), device, recompute, tokens_per_pass, profile)
    else:
        for module in families.values():
            # FSDP2 gives each rank the rows that torch.chunk would
            chunks = torch.arange(module.num_experts).chunk(layout.shard)
            shard_rank = mesh.get_local_rank("shard")
            module.held = tuple(chunks[shard_rank].tolist()) if shard_rank < len(chunks) else ()
    world, replicas = dist.group.WORLD, mesh.get_group("replicate")
    placed = ParallelModel(model, layout, device, owned, world=world, data=world, replicas=replicas, **placement)
    if layout.tensor > 1:
        split_over_tensor_ranks(placed, mesh["tensor"], ranks)
    apply_fsdp(model, mesh, owned, hybrid=layout.replicate > 1)
    model.to_empty(device=device)
    return placed


def place_experts(
    model: Decoder,
    layout: Layout,
    links: Links,
    device: torch.device,
    recompute: bool,
    tokens_per_pass: int,
    profile: MachineProfile | None = None,
) -> dict[str, Any]:
    """Narrow the experts of every MoE layer to their owners and give it the executor and the scheduler of the layout.

    Returns those fields of ParallelModel.
    """
    settings, schedulers, degrees = layout.fssdp, {}, []
    for block in model.layers:
        layer = block.ffn
        if not isinstance(layer, MoELayer):
            continue
        assert isinstance(block.attn, nn.Module)
        layer.experts.split(layout.expert_tensor)
        mixer_flops = 2.0 * tokens_per_pass * sum(p.numel() for p in block.attn.parameters()) / layout.tensor
        hidden_size = model.embed.shape[1]
        cost = layer_cost(layer.experts, hidden_size, model.compute_dtype, settings, mixer_flops=mixer_flops, cluster=links.cluster)
        degrees.append(overlap_degree(settings, links.cluster, cost))
        owner = even_sharding(layer.experts.num_experts, links.tokens.size)
        layer.experts.hold(np.flatnonzero(owner == links.tokens.rank).tolist())
        schedulers[f"{block.name}.ffn"] = LayerScheduler(
            owner, links.tokens.size, make_planner(settings, links.cluster, cost), make_predictor(settings)
        )
        layer.executor = PlacedExecutor(
            owner,
            links,
            device,
            dtype=model.compute_dtype,
            split=split_even if settings.split == "even" else split_quota,
            transport=settings.transport,
            rematerialize=settings.rematerialize,
            recompute=recompute,
            degree=layout.degree or pipeline_degree(layer, cost, tokens_per_pass, links.cluster, profile),
            deduplicate=layout.deduplicate,
            keep=settings.accumulate == "step",
            calibrate=make_calibration(settings, links.cluster, cost),
        )
    return {"schedulers": schedulers, "overlap_degree": min(degrees, default=0)}


def connect(layout: Layout, ranks: Ranks, device: torch.device, profile: MachineProfile | None = None) -> Links:
    """Communicators over this rank's expert group. Collective over the world."""
    tokens, gather, reduce = (join(layout.expert_groups(), layout, ranks) for _ in range(3))
    return Links(tokens, gather, reduce, describe_cluster(tokens.node_of, device, profile))


def split_over_tensor_ranks(placed: ParallelModel, mesh: DeviceMesh, ranks: Ranks) -> None:
    """Tensor parallelism of a model whose experts have been narrowed. mesh: this rank's tensor group."""
    layout, model = placed.layout, placed.model
    peers = join(layout.tensor_groups(), layout, ranks)
    if layout.expert_tensor > 1:
        shape = (layout.world_size // layout.expert_tensor, layout.expert_tensor)
        placed.expert_parts = init_device_mesh(placed.device.type, shape, mesh_dim_names=("expert", "part"))["part"]
    placed.tensor, placed.data = peers.group, join(layout.data_groups(), layout, ranks).group
    whole = frozenset(name for name, _ in model.named_parameters()) - split_dense(model, mesh, peers, placed.expert_parts)
    placed.partial = whole - placed.owned


def join(groups: Sequence[Sequence[int]], layout: Layout, ranks: Ranks) -> Peers:
    """A communicator over that of these groups of global ranks in which this rank is. Collective over the world."""
    peers = [new_peers(group, layout.nodes_of(group, ranks), layout.timeout_seconds) for group in groups]
    return next(mine for group, mine in zip(groups, peers, strict=True) if ranks.rank in group)


def apply_fsdp(model: Decoder, mesh: DeviceMesh, owned: frozenset[str], *, hybrid: bool) -> None:
    """FSDP2 per block and for the rest, with what blocks share; parameters named in ``owned`` are left alone.

    Parameters are gathered in their own dtype (float32 masters): the router and the norms compute in it.
    """
    from torch.distributed.fsdp import fully_shard

    ignored = {parameter for name, parameter in model.named_parameters() if name in owned}
    fsdp_mesh = mesh["replicate", "shard"] if hybrid else mesh["shard"]
    tied = set(model.tied.parameters())
    for block in model.layers:
        fully_shard(block, mesh=fsdp_mesh, ignored_params=ignored | tied)
    fully_shard(model, mesh=fsdp_mesh, ignored_params=ignored)
