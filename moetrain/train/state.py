"""What a checkpoint holds besides tensors, and how model, optimizer and counters become one logical dictionary."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moetrain.parallel.parallelize import ParallelModel
from moetrain.train.optim import optimizer_tensors


@dataclass
class Progress:
    """step: optimizer steps done, skipped ones included. updates: steps that changed the weights. position: global
    index of the next training sequence. skipped_in_a_row: non-finite steps since the last update."""

    step: int = 0
    updates: int = 0
    position: int = 0
    skipped_in_a_row: int = 0

    def to_info(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_info(cls, info: dict[str, Any]) -> Progress:
        return cls(**{name: int(info[name]) for name in cls.__dataclass_fields__})


def model_tensors(placed: ParallelModel) -> dict[str, Tensor]:
    """Logical key -> this rank's part of parameters and persistent buffers. Writing into them writes into the model."""
    tensors = {
        f"model.{logical}": tensor.detach()
        for name, parameter in placed.parameters()
        for logical, tensor in placed.logical(name, parameter)
    }
    tensors.update({f"model.{name}": buffer for name, buffer in placed.model.named_buffers()})
    return tensors


def all_tensors(placed: ParallelModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that a checkpoint stores as tensors."""
    return {**model_tensors(placed), **optimizer_tensors(placed, optimizer)}


def set_update_count(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Adam's bias correction counts updates; it is the same number for all parameters."""
    for state in optimizer.state.values():
        state["step"].fill_(updates)
