"""Puts a single-device model on ranks: ownership of experts, sharding of the rest, materialisation, initial weights.

The order is the same for every model: narrow experts to their owners, activation checkpointing, FSDP2, allocate
from meta, initialise. ``ParallelModel`` then answers all questions that depend on the layout: which parameters are
experts, what a rank's part of the checkpoint is, how gradients become global ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from moetrain.models.common.decoder import Decoder
from moetrain.models.common.init import Constant, Init, draw
from moetrain.moe.context import LayerStatistics, LocalReducer, Reducer
from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoELayer
from moetrain.parallel.collectives import GroupReducer
from moetrain.parallel.executor import Links, PlacedExecutor
from moetrain.parallel.layouts import Layout
from moetrain.parallel.placement.dispatch import split_even, split_quota
from moetrain.parallel.placement.plan import Cluster, Integers
from moetrain.parallel.placement.planners import even_sharding, heterogeneous_sharding
from moetrain.parallel.placement.predict import SlidingWindow
from moetrain.parallel.placement.scheduler import LayerFigures, LayerScheduler
from moetrain.parallel.ranks import Ranks
from moetrain.parallel.scheduling import layer_cost, make_planner, make_predictor, overlap_degree
from moetrain.parallel.transport import new_peers


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass
class ParallelModel:
    """A model in its layout.

    owned: names of the expert parameters of which each rank holds its own rows as plain tensors (ep); all other
    parameters are DTensors, or plain on one process. world, replicas: process groups, None on one process.
    schedulers: plans of placed experts, by MoE layer.
    """

    model: Decoder
    layout: Layout
    device: torch.device
    owned: frozenset[str]
    world: dist.ProcessGroup | None = None
    replicas: dist.ProcessGroup | None = None
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
        """Take the loads of a step into the histories. statistics: of all ranks. Returns figures by MoE layer."""
        figures = {}
        for name, executor in self.executors().items():
            seen = executor.take_observation()
            if seen is not None:
                figures[name] = self.schedulers[name].observe(seen, executor.plan)
        if self.schedulers:
            layers = self.model.moe_layers()
            loads = [statistics[name].dispatched[: layers[name].experts.num_experts].cpu().numpy() for name in self.schedulers]
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
        return {"layout": self.layout.name, "shard": self.layout.shard, "layers": layers, "loads": self.loads.state()}

    def executors(self) -> dict[str, PlacedExecutor]:
        """Executors that place experts, by the name of their MoE layer."""
        layers = self.model.moe_layers()
        return {name: layer.executor for name, layer in layers.items() if isinstance(layer.executor, PlacedExecutor)}

    @property
    def reducer(self) -> Reducer:
        return LocalReducer() if self.world is None else GroupReducer(self.world)

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
        gradients are sums over their group, copies included, and get the same divisor."""
        for executor in self.executors().values():
            executor.add_gradients()
        for name, parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if name in self.owned:
                if self.layout.replicate > 1:
                    dist.all_reduce(parameter.grad, group=self.replicas)
                parameter.grad /= self.layout.world_size

    @torch.no_grad()
    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Scale all gradients so that their global norm is at most max_norm (None: only measure); returns the norm before.

        Each parameter counts once: shards are disjoint, and what replicas hold in common is divided by their number.
        """
        gradients = [local(p.grad) for _, p in self.parameters() if p.grad is not None]
        squares = [norm.double().square() for norm in torch._foreach_norm([g for g in gradients if g.numel()])]
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=self.device)
        if self.world is not None:
            dist.all_reduce(total, group=self.world)
            total /= self.layout.replicate
        norm = total.sqrt()
        if max_norm is not None and norm > max_norm:
            torch._foreach_mul_(gradients, float(max_norm / norm))
        return norm

    def logical(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The logical tensors that a parameter (or anything of its shape, e.g. a moment) stands for on this rank.

        One key per dense parameter; for stacked expert parameters one key per held expert, as views.
        """
        owner, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if not isinstance(module, Experts):
            yield name, tensor
            return
        rows = local(tensor).detach()
        for logical, parameter, row, part in module.logical():
            if parameter == attribute:
                yield f"{owner}.{logical}", rows[row, part.start : part.stop]

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Initial weights, the same for every layout; buffers are zeroed."""
        for name, parameter in self.parameters():
            for logical, tensor in self.logical(name, parameter):
                init = find_init(self.model, logical)
                dtype = tensor.dtype
                value = draw(logical, tuple(tensor.shape), init, seed=seed, dtype=dtype).to(self.device)
                if isinstance(tensor, DTensor):
                    value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
                local(tensor).copy_(value)
        for buffer in self.model.buffers():
            buffer.zero_()


def find_init(model: Decoder, name: str) -> Init:
    """The initialiser of a logical tensor: what its router says, else the first of the model's patterns that matches."""
    for layer, moe in model.moe_layers().items():
        parameter = name.removeprefix(f"{layer}.router.")
        if parameter != name and parameter in moe.router.initial:
            return Constant(moe.router.initial[parameter])
    for pattern, init in model.init.items():
        if fnmatchcase(name, pattern):
            return init
    raise KeyError(f"no initialiser for {name}")


def parallelize(
    model: Decoder, layout: Layout, ranks: Ranks, *, device: torch.device, recompute: bool = False, tokens_per_pass: int = 0
) -> ParallelModel:
    """Place a model that was built on the meta device; its weights are allocated but not initialised.

    recompute: activation checkpointing of every block. tokens_per_pass: of a rank's forward pass, for the cost model.
    Collective if the layout has several ranks; the default process group must exist.
    """
    for block in model.layers:
        block.recompute = recompute  # type: ignore[assignment]
    if layout.world_size == 1:
        model.to_empty(device=device)
        return ParallelModel(model, layout, device, frozenset())

    mesh = init_device_mesh(device.type, (layout.replicate, layout.shard), mesh_dim_names=("replicate", "shard"))
    placement: dict[str, Any] = {}
    families = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    owned: frozenset[str] = frozenset()
    if layout.places_experts:
        owned = frozenset(f"{name}.{parameter}" for name, module in families.items() for parameter, _ in module.named_parameters())
        placement = place_experts(model, layout, connect(mesh, ranks, layout, device), device, recompute, tokens_per_pass)
    else:
        for module in families.values():
            # FSDP2 gives each rank the rows that torch.chunk would
            chunks = torch.arange(module.num_experts).chunk(layout.shard)
            shard_rank = mesh.get_local_rank("shard")
            module.held = tuple(chunks[shard_rank].tolist()) if shard_rank < len(chunks) else ()
    apply_fsdp(model, mesh, owned, hybrid=layout.replicate > 1)
    model.to_empty(device=device)
    groups = {"world": dist.group.WORLD, "replicas": mesh.get_group("replicate")}
    return ParallelModel(model, layout, device, owned, **groups, **placement)


def place_experts(
    model: Decoder, layout: Layout, links: Links, device: torch.device, recompute: bool, tokens_per_pass: int
) -> dict[str, Any]:
    """Narrow the experts of every MoE layer to their owners and give it the executor and the scheduler of the layout.

    Returns those fields of ParallelModel.
    """
    settings, schedulers, degrees = layout.fssdp, {}, []
    for block in model.layers:
        layer = block.ffn
        if not isinstance(layer, MoELayer):
            continue
        mixer_flops = 2.0 * tokens_per_pass * sum(p.numel() for p in block.attn.parameters())
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
            degree=layout.degree,
        )
    return {"schedulers": schedulers, "overlap_degree": min(degrees, default=0)}


def connect(mesh: dist.device_mesh.DeviceMesh, ranks: Ranks, layout: Layout, device: torch.device) -> Links:
    """Communicators over this rank's expert group. Collective over the world: all groups are made by all ranks."""
    groups = mesh.mesh.reshape(-1, layout.shard).tolist() if mesh.ndim == 2 else [mesh.mesh.tolist()]
    mine: list[Links] = []
    for group in groups:
        nodes = layout.nodes_of(group, ranks)
        tokens, gather, reduce = (new_peers(group, nodes, layout.timeout_seconds) for _ in range(3))
        if ranks.rank in group:
            mine.append(Links(tokens, gather, reduce, default_cluster(nodes, device)))
    return mine[0]


def apply_fsdp(model: Decoder, mesh: dist.device_mesh.DeviceMesh, owned: frozenset[str], *, hybrid: bool) -> None:
    """FSDP2 per block and for the rest; parameters named in ``owned`` are left alone.

    Parameters are gathered in their own dtype (float32 masters): the router and the norms compute in it.
    """
    from torch.distributed.fsdp import fully_shard

    ignored = {parameter for name, parameter in model.named_parameters() if name in owned}
    fsdp_mesh = mesh if hybrid else mesh["shard"]
    for block in model.layers:
        fully_shard(block, mesh=fsdp_mesh, ignored_params=ignored)
    fully_shard(model, mesh=fsdp_mesh, ignored_params=ignored)


def default_cluster(node_of: tuple[int, ...], device: torch.device) -> Cluster:
    """Links and processors as assumed without a measured profile: H100s with NVLink and 400 Gbit/s per node, or CPU
    cores that talk over loopback."""
    if device.type == "cuda":
        return Cluster(node_of, intra_bandwidth=300e9, inter_bandwidth=50e9, latency=20e-6, flops=400e12)
    return Cluster(node_of, intra_bandwidth=1e9, inter_bandwidth=1e9, latency=1e-3, flops=80e9)
