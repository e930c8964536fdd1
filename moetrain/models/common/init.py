"""Initial weights that do not depend on the layout: each logical tensor is drawn from a seed made of the run's seed
and the tensor's name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moetrain.ops.noise import hash_text


class Init(Protocol):
    """Fills a tensor in place; a matrix is [..., out, in]."""

    def __call__(self, tensor: Tensor, generator: torch.Generator, /) -> None: ...


@dataclass(frozen=True)
class Normal:
    """Normal distribution around zero."""

    std: float

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0.0, self.std, generator=generator)


@dataclass(frozen=True)
class FanIn:
    """Uniform with variance scale / fan-in, fan-in being the last dimension."""

    scale: float = 1.0

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        bound = math.sqrt(3.0 * self.scale / tensor.shape[-1])
        tensor.uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(self.value)


def draw(name: str, shape: torch.Size | tuple[int, ...], init: Init, *, seed: int, dtype: torch.dtype) -> Tensor:
    """The full initial value of one logical tensor, on CPU. It is the same for every layout.

    Floating-point numbers are drawn in float32 unless dtype is float64: bfloat16 and float32 runs start from the same ones.
    """
    # CPU generators use only the low 32 bits of a seed
    generator = torch.Generator().manual_seed(hash_text(f"{seed}/{name}", bits=32))
    tensor = torch.empty(shape, dtype=torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype)
    init(tensor, generator)
    return tensor.to(dtype)
