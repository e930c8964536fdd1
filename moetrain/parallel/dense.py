"""Tensor parallelism of everything that is not an expert, with sequence parallelism between the blocks.

Column and row splits follow Megatron-LM (1909.08053), the residual stream in slices Korthikanti et al. (2205.05198).
The ranks of a tensor group see the same micro-batch of T tokens. Between blocks each holds T / n neighbouring tokens:
norms and residual sums run on those; before a block all tokens are gathered, after it partial results are summed
and scattered. The MoE layer routes all tokens on every rank, so that no rule notices the split, and each rank has its
own run of tokens executed.

Gradients: the backward of every collective is its adjoint, and each rank's loss is 1 / n of the loss. So the gradients
of split parameters are complete, and those of whole ones are partial: they are summed over the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

from moetrain.errors import ConfigError, Problem
from moetrain.models.common.attention import AttentionInput
from moetrain.models.common.decoder import Block, Decoder
from moetrain.models.common.sharding import Split, find_split
from moetrain.moe.context import RouterContext
from moetrain.moe.execution import Executor
from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoELayer
from moetrain.moe.routing import Routing
from moetrain.ops.cross_entropy import linear_cross_entropy
from moetrain.parallel.collectives import Peers, count_traffic, naming, sum_over

SPLIT_DIM: dict[Split, int] = {"column": 0, "heads": 0, "vocabulary": 0, "row": 1}


def split_dense(model: Decoder, mesh: DeviceMesh, peers: Peers, expert_parts: DeviceMesh | None) -> frozenset[str]:
    """Put a model on the ranks of a tensor group; returns the names of the parameters of which each has a part.

    mesh, peers: the group. expert_parts: the ranks that share each expert, None if experts are whole.
    """
    split = split_parameters(model, mesh)
    sharing, partial = 1, None
    if expert_parts is not None:
        sharing = expert_parts.size()
        first = peers.rank // sharing * sharing
        partial = Peers(expert_parts.get_group(), peers.node_of[first : first + sharing])
    slice_tokens(model, peers, ExpertSlices(peers.size // sharing, peers.rank // sharing, partial))
    return split


def split_parameters(model: Decoder, mesh: DeviceMesh) -> frozenset[str]:
    """Make DTensors of the parameters that the model's table splits. mesh: the tensor group's. Returns their names.

    Sizes that the group does not divide are split unevenly. Raises ConfigError where a rank would get nothing.
    """
    ranks, names = mesh.size(), set()
    for name, parameter in list(model.named_parameters()):
        dim = SPLIT_DIM.get(find_split(model.splits, name))
        if dim is None:
            continue
        if part_size(parameter.shape[dim], ranks) * (ranks - 1) >= parameter.shape[dim]:
            raise ConfigError([Problem("parallel.tensor", ranks, f"is too many for {name} with {parameter.shape[dim]} to split")])
        owner, _, attribute = name.rpartition(".")
        split = distribute_tensor(parameter.detach(), mesh, [Shard(dim)], src_data_rank=None)
        model.get_submodule(owner).register_parameter(attribute, nn.Parameter(split))
        names.add(name)
    return frozenset(names)


def part_size(size: int, ranks: int) -> int:
    """Size of all parts but the last ones, which may be smaller: what DTensor and ``torch.chunk`` do."""
    return -(-size // ranks)


def slice_tokens(model: Decoder, peers: Peers, expert_slices: ExpertSlices) -> None:
    """Put the collectives between and around the blocks."""

    def gather_sequences(module: nn.Module, args: tuple[Tensor, AttentionInput]) -> tuple[Tensor, AttentionInput]:
        x, shared = args
        return all_gather_rows(x, peers).unflatten(0, (-1, shared.positions.numel())), shared

    def gather_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return all_gather_rows(args[0], peers), *args[1:]

    def gather_output(module: nn.Module, args: Any, x: Tensor) -> Tensor:
        return all_gather_rows(x, peers)

    def scatter_output(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return reduce_scatter_rows(y.reshape(-1, y.shape[-1]), peers)

    def narrow_input(module: nn.Module, args: tuple[Tensor, Routing]) -> tuple[Tensor, Routing]:
        x, routing = args
        count = routing.num_tokens // peers.size
        first = peers.rank * count
        return x[first : first + count], routing.narrow(first, count)

    for block in model.layers:
        assert isinstance(block, Block)
        block.attn.register_forward_pre_hook(gather_sequences)
        block.attn.register_forward_hook(scatter_output)
        block.ffn.register_forward_pre_hook(gather_input)
        if isinstance(block.ffn, MoELayer):
            block.ffn.executor = SlicedExecutor(block.ffn.executor, expert_slices)
            if block.ffn.zero_experts is not None:
                block.ffn.zero_experts.register_forward_pre_hook(narrow_input)
        row_parallel = block.ffn.shared if isinstance(block.ffn, MoELayer) else block.ffn
        if row_parallel is not None:
            row_parallel.register_forward_hook(scatter_output)
    model.norm.register_forward_hook(gather_output)
    model.vocabulary = SplitVocabulary(model.embed.shape[0], peers)


@dataclass(frozen=True)
class ExpertSlices:
    """Which run of the tokens this rank dispatches: number ``index`` of ``count``.

    partial: the neighbours that dispatch the same run, each to its part of every expert; None if experts are whole.
    """

    count: int
    index: int
    partial: Peers | None = None


class SlicedExecutor:
    """Executes this rank's run of the tokens only: x [T, D], the routing of all T tokens -> y [T / n, D]."""

    def __init__(self, inner: Executor, slices: ExpertSlices) -> None:
        self.inner, self.slices = inner, slices

    def prefetch(self, experts: Experts, ctx: RouterContext) -> None:
        self.inner.prefetch(experts, ctx)

    def __call__(self, x: Tensor, routing: Routing, experts: Experts, ctx: RouterContext) -> Tensor:
        slices = self.slices
        count = routing.num_tokens // slices.count
        first = slices.index * count
        routing = routing.narrow(first, count)
        if slices.partial is None:
            return self.inner(x[first : first + count], routing, experts, ctx)
        return reduce_scatter_rows(self.inner(x[first : first + count], routing, experts, ctx), slices.partial)


class SplitVocabulary:
    """:class:`moetrain.models.common.vocabulary.Vocabulary` with equal runs of its entries on the ranks of a group.

    Logits never leave their rank: what travels is a maximum and two sums per token.
    """

    def __init__(self, size: int, peers: Peers) -> None:
        self.peers = peers
        self.largest = part_size(size, peers.size)
        self.first = peers.rank * self.largest

    def embed(self, tokens: Tensor, rows: Tensor) -> Tensor:
        index, here = self.locate(tokens.reshape(-1), rows.shape[0])
        x = torch.where(here[:, None], F.embedding(index, rows), 0.0)
        return reduce_scatter_rows(x, self.peers)

    def log_partition(self, logits: Tensor) -> Tensor:
        return _LogPartition.apply(logits, self.peers)

    def sum(self, values: Tensor) -> Tensor:
        return sum_over(values.sum(dim=1), self.peers.group)

    def negative_log_likelihood(self, logits: Tensor, targets: Tensor, *, ignore: int) -> Tensor:
        index, here = self.locate(targets, logits.shape[1])
        chosen = torch.where(here, logits.gather(1, index[:, None])[:, 0], 0.0)
        per_token = self.log_partition(logits) - sum_over(chosen, self.peers.group)
        return torch.where(targets != ignore, per_token, 0.0).sum()

    def cross_entropy(self, hidden: Tensor, rows: Tensor, targets: Tensor, *, ignore: int, z_weight: float = 0.0) -> tuple[Tensor, Tensor]:
        part = _Part(self.first, self.largest, self.peers)
        return linear_cross_entropy(hidden, rows, targets, ignore=ignore, z_weight=z_weight, part=part)

    def locate(self, entries: Tensor, held: int) -> tuple[Tensor, Tensor]:
        """Index of each entry [T] among the ``held`` ones of this rank (0 if it is elsewhere), and whether it is here."""
        index = entries - self.first
        here = (index >= 0) & (index < held)
        return torch.where(here, index, 0), here


@dataclass
class _Part:
    """:class:`moetrain.ops.cross_entropy.OutputPart` of a rank of a tensor group."""

    first: int
    largest: int
    peers: Peers

    def combine(self, log_partition: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        top = log_partition.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.peers.group)
        total, chosen = self.sum(torch.stack([(log_partition - top).exp(), chosen]))
        return top + total.log(), chosen

    def sum(self, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values, group=self.peers.group)
        return values


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, peers: Peers) -> Tensor:  # type: ignore[override]
        top = logits.amax(dim=1)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=peers.group)
        share = (logits - top[:, None]).exp_()
        total = share.sum(dim=1)
        dist.all_reduce(total, group=peers.group)
        ctx.peers = peers
        ctx.save_for_backward(share.div_(total[:, None]))
        return top + total.log()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (share,) = ctx.saved_tensors
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.peers.group)
        return share * grad[:, None], None


def all_gather_rows(x: Tensor, peers: Peers) -> Tensor:
    """[n, D] of each rank -> [ranks * n, D]. The gradient is summed and scattered."""
    return _AllGatherRows.apply(x, peers)


def reduce_scatter_rows(x: Tensor, peers: Peers) -> Tensor:
    """[ranks * n, D] -> the rank's n rows of the sum over ranks. The gradient is gathered."""
    return _ReduceScatterRows.apply(x, peers)


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:  # type: ignore[override]
        ctx.peers = peers
        return _gather(x, peers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _reduce(grad, ctx.peers), None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:  # type: ignore[override]
        ctx.peers = peers
        return _reduce(x, peers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _gather(grad, ctx.peers), None


def _gather(x: Tensor, peers: Peers) -> Tensor:
    out = x.new_empty(peers.size * x.shape[0], *x.shape[1:])
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.13
    with naming("tensor_all_gather", peers):
        gather(out, x.contiguous(), group=peers.group)
    count_traffic("tensor_all_gather", [x.numel() * x.element_size()] * peers.size, peers)
    return out


def _reduce(x: Tensor, peers: Peers) -> Tensor:
    if x.shape[0] % peers.size:
        raise ValueError(f"{x.shape[0]} tokens of a micro-batch cannot be cut into {peers.size} equal runs (parallel.tensor)")
    out = x.new_empty(x.shape[0] // peers.size, *x.shape[1:])
    reduce = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # renamed in torch 2.13
    with naming("tensor_reduce_scatter", peers):
        reduce(out, x.contiguous(), group=peers.group)
    count_traffic("tensor_reduce_scatter", [out.numel() * out.element_size()] * peers.size, peers)
    return out


def sum_in_place(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum tensors of one dtype over the ranks of a group, in one collective."""
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))
