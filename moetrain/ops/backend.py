"""Which operations run as Triton kernels. They are imported when a CUDA tensor first needs them."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_kernels(name: str, x: Tensor) -> ModuleType | None:
    """The module ``moetrain.kernels.triton_ops.<name>`` if it takes tensors like x, else None: on CPU, in float64, or
    without Triton. Integers are taken."""
    if not x.is_cuda or (x.is_floating_point() and x.dtype not in _DTYPES) or not _triton_is_installed():
        return None
    return importlib.import_module(f"moetrain.kernels.triton_ops.{name}")


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
