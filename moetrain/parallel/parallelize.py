"""Puts a single-device model on ranks: ownership of experts, sharding of the rest, materialisation, initial weights.

The order is the same for every model: narrow experts to their owners, split matrices, activation checkpointing,
FSDP2, allocate from meta, initialise. ``ParallelModel`` then answers all questions that depend on the layout: which parameters are
experts, what a rank's part of the checkpoint is, how gradients become global ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moetrain.models.common.decoder import Decoder
from moetrain.models.common.init import Init, draw
from moetrain.moe.context import LocalReducer, Reducer
from moetrain.moe.experts import Experts
from moetrain.parallel.collectives import GroupReducer
from moetrain.parallel.dense import split_dense, sum_in_place
from moetrain.parallel.executor import OwnersExecutor, even_owners
from moetrain.parallel.layouts import Layout
from moetrain.parallel.ranks import Ranks


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass
class ParallelModel:
    """A model in its layout.

    owned: names of the expert parameters of which each rank holds its own rows as plain tensors (ep); all other
    parameters are DTensors, or plain on one process. partial: names of those that all ranks of a tensor group hold
    alike, each with its own part of the gradient. Process groups, None on one process: world, data (ranks with different
    data that hold the same parts of matrices), replicas; tensor, None without tensor parallelism. expert_parts: mesh of
    the ranks that share each owned expert, None if experts are whole.
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
        gradients are sums over their group and get the same divisor. Parts of tensor ranks are summed."""
        for name, parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if name in self.owned:
                if self.layout.replicate > 1:
                    dist.all_reduce(parameter.grad, group=self.replicas)
                parameter.grad /= self.layout.data_world_size
        if self.tensor is not None:
            sum_in_place([local(p.grad) for name, p in self.parameters() if name in self.partial and p.grad is not None], self.tensor)

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
    """The initialiser of a logical tensor: the first pattern that matches."""
    for pattern, init in model.init.items():
        if fnmatchcase(name, pattern):
            return init
    raise KeyError(f"no initialiser for {name}")


def parallelize(model: Decoder, layout: Layout, ranks: Ranks, *, device: torch.device, recompute: bool = False) -> ParallelModel:
    """Place a model that was built on the meta device; its weights are allocated but not initialised.

    Collective if the layout has several ranks; the default process group must exist.
    """
    for block in model.layers:
        block.recompute = recompute  # type: ignore[assignment]
    if layout.world_size == 1:
        model.to_empty(device=device)
        return ParallelModel(model, layout, device, frozenset())

    mesh = init_device_mesh(device.type, (layout.replicate, layout.shard, layout.tensor), mesh_dim_names=("replicate", "shard", "tensor"))
    shard_rank = mesh.get_local_rank("shard")
    families = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    owned: frozenset[str] = frozenset()
    expert_parts: DeviceMesh | None = None
    if layout.name == "ep":
        owned = frozenset(f"{name}.{parameter}" for name, module in families.items() for parameter, _ in module.named_parameters())
        expert_mesh = fold_experts(layout, device)
        expert_parts = expert_mesh["expert_tensor"] if layout.expert_tensor > 1 else None
        for layer in model.moe_layers().values():
            owners = even_owners(layer.experts.num_experts, expert_mesh["expert"].size())
            layer.experts.hold(owners[expert_mesh.get_local_rank("expert")])
            layer.experts.split(layout.expert_tensor)
            layer.executor = OwnersExecutor(owners, expert_mesh.get_group("expert"), device)
    else:
        for module in families.values():
            # FSDP2 gives each rank the rows that torch.chunk would
            chunks = torch.arange(module.num_experts).chunk(layout.shard)
            module.held = tuple(chunks[shard_rank].tolist()) if shard_rank < len(chunks) else ()
    partial: frozenset[str] = frozenset()
    if layout.tensor > 1:
        split = split_dense(model, mesh["tensor"], expert_parts)
        partial = frozenset(name for name, _ in model.named_parameters()) - split - owned
    apply_fsdp(model, mesh, owned, hybrid=layout.replicate > 1)
    model.to_empty(device=device)
    return ParallelModel(
        model,
        layout,
        device,
        owned,
        partial,
        world=dist.group.WORLD,
        data=data_group(layout, device),
        replicas=mesh.get_group("replicate"),
        tensor=mesh.get_group("tensor") if layout.tensor > 1 else None,
        expert_parts=expert_parts,
    )


def fold_experts(layout: Layout, device: torch.device) -> DeviceMesh:
    """The ranks as replicas x owners of experts x parts of an expert."""
    shape = (layout.replicate, layout.shard * layout.tensor // layout.expert_tensor, layout.expert_tensor)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "expert", "expert_tensor"))


def data_group(layout: Layout, device: torch.device) -> dist.ProcessGroup | None:
    """The ranks that hold the same parts of matrices and see different data."""
    if layout.tensor == 1:
        return dist.group.WORLD
    mesh = init_device_mesh(device.type, (layout.data_world_size, layout.tensor), mesh_dim_names=("data", "tensor"))
    return mesh.get_group("data")


def apply_fsdp(model: Decoder, mesh: DeviceMesh, owned: frozenset[str], *, hybrid: bool) -> None:
    """FSDP2 per block and for the rest; parameters named in ``owned`` are left alone.

    Parameters are gathered in their own dtype (float32 masters): the router and the norms compute in it.
    """
    from torch.distributed.fsdp import fully_shard

    ignored = {parameter for name, parameter in model.named_parameters() if name in owned}
    fsdp_mesh = mesh["replicate", "shard"] if hybrid else mesh["shard"]
    for block in model.layers:
        fully_shard(block, mesh=fsdp_mesh, ignored_params=ignored)
    fully_shard(model, mesh=fsdp_mesh, ignored_params=ignored)
