"""AdamW and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from moetrain.config import Component, setting
from moetrain.errors import Problem
from moetrain.registry import register

if TYPE_CHECKING:  # every command reads this module for its settings, and these take most of a second to import
    from torch.distributed.device_mesh import DeviceMesh

    from moetrain.parallel.parallelize import ParallelModel


@register("optim", "adamw", source="Loshchilov and Hutter 1711.05101")
@dataclass(kw_only=True)
class AdamWConfig(Component):
    """AdamW; norms, biases and other vectors are not decayed."""

    lr: float = setting(doc="peak learning rate", gt=0)
    beta1: float = setting(0.9, doc="decay of the first moment", ge=0, lt=1)
    beta2: float = setting(0.95, doc="decay of the second moment", ge=0, lt=1)
    eps: float = setting(1e-8, doc="added to the root of the second moment", gt=0)
    weight_decay: float = setting(0.1, doc="decoupled weight decay per unit of learning rate", ge=0)
    clip_norm: float | None = setting(1.0, doc="clip the global gradient norm to this; null: never", gt=0)

    def build(self, placed: ParallelModel) -> torch.optim.AdamW:
        """Optimizer over the parameters of this rank, with its state allocated."""
        optimizer = torch.optim.AdamW(
            parameter_groups(placed, self.weight_decay), lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True
        )
        for group in optimizer.param_groups:
            for p in group["params"]:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        return optimizer


MOMENTS = ("exp_avg", "exp_avg_sq")


def parameter_groups(placed: ParallelModel, weight_decay: float) -> list[dict[str, object]]:
    """Groups by (mesh or plain) x (decayed or not): fused kernels refuse DTensors of two meshes, or beside plain tensors,
    in one group."""
    groups: dict[tuple[DeviceMesh | None, bool], list[torch.nn.Parameter]] = {}
    for _, parameter in placed.parameters():
        mesh = getattr(parameter, "device_mesh", None)  # of a DTensor
        groups.setdefault((mesh, parameter.ndim > 1), []).append(parameter)
    return [{"params": params, "weight_decay": weight_decay if decayed else 0.0} for (_, decayed), params in groups.items()]


def optimizer_tensors(placed: ParallelModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Logical key -> moment, for the checkpoint."""
    return {
        f"optim.{logical}.{moment}": tensor
        for name, parameter in placed.parameters()
        for moment in MOMENTS
        for logical, tensor in placed.logical(name, optimizer.state[parameter][moment])
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The same learning rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@dataclass(kw_only=True)
class Schedule(Component):
    """Learning rate as a factor of its peak, by the number of updates done (skipped steps do not count)."""

    warmup_steps: int = setting(20, doc="updates of linear warm-up from 0", ge=0)
    final_factor: float = setting(0.1, doc="factor at the end of training", ge=0, le=1)

    def factor(self, update: int, total: int) -> float:
        """Factor for update number ``update`` (from 0) of ``total``."""
        if update < self.warmup_steps:
            return (update + 1) / self.warmup_steps
        return self.decay(update - self.warmup_steps, max(1, total - self.warmup_steps))

    def decay(self, update: int, total: int) -> float:
        """Factor after warm-up; both counted from its end."""
        raise NotImplementedError


@register("schedule", "cosine", source="SGDR 1608.03983")
@dataclass(kw_only=True)
class CosineConfig(Schedule):
    """Linear warm-up, then half a cosine down to final_factor."""

    def decay(self, update: int, total: int) -> float:
        progress = min(1.0, update / total)
        return self.final_factor + (1 - self.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))


@register("schedule", "wsd", source="MiniCPM 2404.06395")
@dataclass(kw_only=True)
class WSDConfig(Schedule):
    """Warm-up, stable at the peak, then decay over the last part of training."""

    decay_fraction: float = setting(0.1, doc="part of the updates after warm-up that decay", gt=0, le=1)
    shape: Literal["linear", "exponential"] = setting("linear", doc="form of the decay")

    def problems(self, path: str) -> Iterable[Problem]:
        if self.shape == "exponential" and self.final_factor == 0:
            yield Problem(f"{path}.final_factor", 0.0, "must be > 0 with an exponential decay")

    def decay(self, update: int, total: int) -> float:
        start = total * (1 - self.decay_fraction)
        if update < start:
            return 1.0
        progress = min(1.0, (update - start) / (total - start))
        if self.shape == "exponential":
            return self.final_factor**progress
        return 1 - (1 - self.final_factor) * progress


@register("schedule", "constant")
@dataclass(kw_only=True)
class ConstantConfig(Schedule):
    """Linear warm-up, then constant; final_factor is not used."""

    def decay(self, update: int, total: int) -> float:
        return 1.0
