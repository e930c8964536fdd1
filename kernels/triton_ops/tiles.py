"""The one table of tile sizes, and what every kernel needs to be launched.

Products are cut into tiles of ``rows x columns`` results; ``depth`` bytes of each operand's row are multiplied at a time
(128 bytes is the widest swizzle of shared memory), ``stages`` of them are in flight, and a processor holds ``resident``
programs of ``warps`` warps each. The first entry is used where nothing can be measured; among several the fastest is
measured once per shape, dtype and GPU, and kept in Triton's cache ($TRITON_CACHE_DIR). MOETRAIN_TRITON_TUNE=0 always
takes the first: the same sums on every machine of a kind. One small tile serves what is not easy: float32, and sizes of
which rows are not whole vectors.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GROUP_ROWS = 8
"""Tiles of rows that pass over all columns together, so that the second-level cache serves both operands."""
LARGEST_MATRIX = 2**31
"""Offsets within one expert's matrix are 32-bit; those of rows, experts and results are 64-bit."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """See the head of this file."""

    rows: int
    columns: int
    depth: int = 128
    warps: int = 8
    stages: int = 3
    resident: int = 1

    @property
    def constants(self) -> dict[str, int]:
        """The kernels' names of these sizes."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH_BYTES": self.depth, "RESIDENT": self.resident}

    def config(self) -> triton.Config:
        """As Triton's autotuner takes it."""
        return triton.Config(self.constants, num_warps=self.warps, num_stages=self.stages)


_TINY = [Tile(rows=16, columns=16, depth=64, warps=1, stages=1, resident=1)]

# Hopper and data-centre Blackwell: 227 KiB of shared memory, 64 Ki registers: one program of 8 warps with 128 x 256
# float32 sums, or two with 128 x 128 that hide each other's epilogues.
_WIDE = Tile(rows=128, columns=256, stages=4)
_PAIR = Tile(rows=128, columns=128, warps=4, stages=3, resident=2)
_SQUARE = Tile(rows=128, columns=128, stages=4)
_HALF = Tile(rows=128, columns=64, warps=4, stages=3, resident=2)
_FEW_ROWS = Tile(rows=64, columns=128, warps=4, stages=4, resident=2)
# Ampere and Ada: 163 KiB, on small chips 99 KiB
_AMPERE = [
    Tile(rows=128, columns=128, depth=64, stages=4, resident=1),
    Tile(rows=128, columns=128, depth=64, warps=4, stages=3, resident=2),
    Tile(rows=64, columns=128, depth=64, warps=4, stages=4, resident=2),
]
# MI300: 64 KiB of local memory
_CDNA = [Tile(rows=128, columns=128, depth=128, warps=8, stages=2, resident=1), Tile(rows=64, columns=64, warps=4, stages=2, resident=2)]

# The sums of gate and up columns double the registers of an activation tile.
TILES: dict[str, dict[str, list[Tile]]] = {
    "plain": {
        "sm_100": [_WIDE, _PAIR, _SQUARE],
        "sm_90": [_WIDE, _PAIR, _SQUARE, _FEW_ROWS],
        "sm_80": _AMPERE,
        "gfx942": _CDNA,
        "interpreter": _TINY,
    },
    "activation": {
        "sm_100": [_SQUARE, _HALF],
        "sm_90": [_SQUARE, _HALF, Tile(rows=64, columns=64, warps=4, stages=4, resident=2)],
        "sm_80": [Tile(rows=128, columns=64, depth=64, stages=4), Tile(rows=64, columns=64, depth=64, warps=4, stages=4, resident=2)],
        "gfx942": [Tile(rows=128, columns=64, stages=2), Tile(rows=64, columns=64, warps=4, stages=2, resident=2)],
        "interpreter": _TINY,
    },
    "activation_backward": {
        "sm_100": [_WIDE, _SQUARE],
        "sm_90": [_WIDE, _SQUARE, _FEW_ROWS],
        "sm_80": [_AMPERE[0], _AMPERE[2]],
        "gfx942": [Tile(rows=128, columns=128, stages=2), Tile(rows=64, columns=128, warps=4, stages=2)],
        "interpreter": [Tile(rows=16, columns=64, depth=64, warps=1, stages=1)],  # two parts
    },
    "outer": {
        "sm_100": [_WIDE, _PAIR, _SQUARE],
        "sm_90": [_WIDE, _PAIR, _SQUARE],
        "sm_80": _AMPERE[:1],
        "gfx942": _CDNA,
        "interpreter": _TINY,
    },
}


_SMALL = Tile(rows=64, columns=64, depth=64)
HARD = {
    "sm_100": Tile(rows=64, columns=32, depth=64),
    "sm_90": _SMALL,
    "sm_80": _SMALL,
    "gfx942": Tile(rows=64, columns=64, depth=64, stages=2),
    "interpreter": Tile(rows=16, columns=32, depth=64, warps=1, stages=1),
}
"""Of every kernel: each element has its own address and mask, or each product is three."""


def family(major: int, minor: int) -> str:
    """The column of :data:`TILES` for a compute capability."""
    return {(9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get((major, minor), "sm_80")


def target() -> str:
    """The column for this machine; sm_90 where there is no GPU (kernels are then only compiled)."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    return family(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "sm_90"


def tiles(kernel: str, column: str | None = None) -> list[Tile]:
    """The shipped tiles of a kernel, the default first."""
    return TILES[kernel][column or target()]


@dataclass(frozen=True)
class Tuned:
    """A jitted kernel with its tiles."""

    kernel: Any
    """As ``triton.jit`` made it."""
    shipped: Any
    """With the tiles of :data:`TILES`, of which the fastest is taken."""
    hard: Any
    """With that of :data:`HARD`."""

    def serving(self, easy: bool) -> Any:
        """The one to launch."""
        return self.shipped if easy else self.hard


def tuned(name: str, key: list[str]) -> Callable[[Any], Tuned]:
    """Decorates a jitted kernel; ``key``: the arguments on which the choice of a tile depends."""
    shipped = tiles(name)
    if os.environ.get("MOETRAIN_TRITON_TUNE") == "0":
        shipped = shipped[:1]
    # older releases choose anew in every process
    keeps = {"cache_results": True} if "cache_results" in inspect.signature(triton.autotune).parameters else {}

    def decorate(kernel: Any) -> Tuned:
        choice = triton.autotune([tile.config() for tile in shipped], key=key, **keeps)(kernel)
        return Tuned(kernel, choice, triton.autotune([HARD[target()].config()], key=[])(kernel))

    return decorate


def programs(tiles_at_most: int, resident: int, device: torch.device) -> int:
    """Size of a persistent grid: no more programs than fit at once, no more than there can be tiles."""
    # three, so that a program of an interpreted test meets several tiles
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
    return max(1, min(processors * resident, tiles_at_most))


def easy(*operands: Tensor) -> bool:
    """Whether row-major operands can be read in whole vectors and multiplied at once. (The interpreter multiplies all at once.)"""
    fits = all(t.shape[-1] % 16 == 0 and t.data_ptr() % 16 == 0 for t in operands)
    return fits and (INTERPRETED or operands[0].element_size() == 2)


def prepare_boxes(is_easy: bool) -> bool:
    """Whether the hardware copies boxes of an operand by itself (TMA); if so, makes it ready for that.

    Descriptors of boxes are made in the kernels, in memory from torch. Each thread has its own setting, and backward runs in another.
    """
    can = INTERPRETED or target() in ("sm_90", "sm_100")
    if not (is_easy and can and hasattr(triton.language, "make_tensor_descriptor")):
        return False
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    return True


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: three TF32 products on CUDA keep about float32's accuracy."""
    return "tf32x3" if dtype == torch.float32 and not torch.version.hip else "ieee"


def bucket(rows: int, experts: int) -> int:
    """Rows per expert to the power of two: what a choice of tiles may depend on, though the number changes every step."""
    return max(rows // max(experts, 1), 1).bit_length()
