"""An expert family: parameters stacked by expert, and one grouped computation over rows sorted by expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moetrain.ops.expert_sets import ExpertSet, sections
from moetrain.ops.permute import Rows, combine_rows, gather_rows


@dataclass(frozen=True)
class ExpertTensor:
    """Where one logical tensor of every expert lives in the stacked parameters.

    name: logical name within an expert, e.g. ``w_gate``. parameter: attribute of the stacked parameter [e, rows, ...].
    start, stop: the rows that belong to it. split_dim: dim of the logical tensor along which ranks that share an expert
    cut it; those of one stacked parameter have the same.
    """

    name: str
    parameter: str
    start: int
    stop: int
    split_dim: int


class Experts(nn.Module):
    """num_experts: E of the family over all ranks. held: global ids of the rows in the stacked parameters, all E of
    them unless :meth:`hold` has narrowed them to those that this rank owns."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.held: tuple[int, ...] = tuple(range(num_experts))

    def tensors(self) -> Sequence[ExpertTensor]:
        """The logical tensors of an expert."""
        raise NotImplementedError

    def compute(self, x: Tensor, counts: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """Rows sorted by expert [R, D] -> [R, D']. counts: [e] int64 rows per slot. weights: as :meth:`weights`,
        one row per slot: the held experts, or copies of others."""
        raise NotImplementedError

    def execute(self, x: Tensor, rows: Rows, weight: Tensor | None, sets: Sequence[ExpertSet]) -> Tensor:
        """Tokens [T, D] -> weighted sums over each token's rows [T, D']. rows: sorted by set and expert. weight: [N] factors of
        their outputs. Families with a faster way than gather, :meth:`compute` and combine replace it."""
        inputs = gather_rows(x, rows)
        parts = [inputs[section] for section in sections(sets, len(inputs))]
        y = [self.compute(part, each.counts, each.weights) for part, each in zip(parts, sets, strict=True)]
        return combine_rows(y[0] if len(y) == 1 else torch.cat(y), weight, rows)

    def weights(self) -> tuple[Tensor, ...]:
        """The stacked parameters [e, ...]."""
        return tuple(self.parameters())

    def flops_per_row(self) -> int:
        """Multiply-adds times two of the forward pass for one row."""
        raise NotImplementedError

    def hold(self, experts: Sequence[int]) -> None:
        """Narrow the (uninitialised) parameters to these global ids, in this order."""
        self.held = tuple(experts)
        for name, parameter in list(self.named_parameters()):
            shape = (len(self.held), *parameter.shape[1:])
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device=parameter.device)))

    def split(self, parts: int) -> None:
        """Narrow the (uninitialised) parameters to one of ``parts`` equal parts of every expert, whose outputs sum to the
        whole expert's."""
        split_dims = {tensor.parameter: tensor.split_dim for tensor in self.tensors()}
        for name, parameter in list(self.named_parameters()):
            shape = list(parameter.shape)
            shape[1 + split_dims[name]] //= parts
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device=parameter.device)))

    def logical(self) -> Iterator[tuple[str, str, int, ExpertTensor]]:
        """(logical name ``<expert>.<tensor>``, parameter name, row, tensor) for every held expert."""
        for row, expert in enumerate(self.held):
            for tensor in self.tensors():
                yield f"{expert}.{tensor.name}", tensor.parameter, row, tensor
