"""Compiles every Triton kernel with its shipped tiles for GPUs that need not be here, and says what became of it.

Targets: sm_80 (A100), sm_90 (H100), sm_100 (B200), gfx942 (MI300). Per build: registers, spilled bytes (local memory, on AMD
scratch), shared memory, matrix instructions, bulk copies (TMA), and the programs and warps that a
processor then holds at once. A product without matrix instructions, any spill, and more shared memory than the target has are
faults; the script then ends with status 1. Needs the triton wheel, which brings cuobjdump, and no GPU.

usage: python scripts/bench/compile_kernels.py [--out FOLDER] [--target sm_90 ...] [--kernel plain ...]
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default, which newer releases warn about

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moetrain.kernels.triton_ops import grouped_gemm, grouped_outer, router, segment_sum, sort_experts
from moetrain.kernels.triton_ops.tiles import GROUP_ROWS, HARD, TILES, Tile

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Target:
    """What one processor (SM, CU) of a GPU holds; from the vendors' tables of compute capabilities."""

    gpu: GPUTarget
    matrix: str
    """Pattern of its matrix instructions of 16-bit operands in machine code. (float32 may use those of an older generation.)"""
    shared_program: int
    """Most shared memory of one program, bytes."""
    shared: int
    """Shared memory of a processor, bytes; each program costs ``shared_reserved`` more."""
    shared_reserved: int
    warps: int
    programs: int = 32
    registers: int = 65536


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), r"\bHMMA", 163 << 10, 164 << 10, 1024, 64),
    "sm_90": Target(GPUTarget("cuda", 90, 32), r"\bHGMMA", 227 << 10, 228 << 10, 1024, 64),
    "sm_100": Target(GPUTarget("cuda", 100, 32), r"\bUTC\w*MMA", 227 << 10, 228 << 10, 1024, 64),
    # four SIMD units with 512 vector registers per lane and 8 waves each
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), r"\bv_mfma", 64 << 10, 64 << 10, 0, 32, registers=4 * 512 * 64),
}


@dataclass(frozen=True)
class Build:
    """One kernel as it would be compiled at its first launch."""

    target: str
    kernel: str
    variant: str
    dtype: str
    tile: Tile | None
    """None: a kernel without products."""
    warps: int
    constants: dict[str, Any] = field(hash=False)
    aligned: bool = True
    """Whether pointers and the sizes of dims are multiples of 16."""

    @property
    def name(self) -> str:
        """Kernel, variant, tile and dtype."""
        size = f" {self.tile.rows}x{self.tile.columns}x{self.tile.depth}B" if self.tile else ""
        return f"{self.kernel}, {self.variant}{size}, {self.warps} warps, {self.dtype}"

    @cached_property
    def function(self) -> Any:
        """The jitted kernel."""
        kernel = KERNELS[self.kernel]
        return kernel.kernel if self.tile else kernel

    def compile(self) -> Any:
        """Triton's compiled kernel."""
        names = self.function.arg_names
        constants = {**self.constants, **(self.tile.constants if self.tile else {})}
        types = {name: "constexpr" if name in constants else _type(name, self.dtype) for name in names}
        divisible = [["tt.divisibility", 16]]
        free = {p.name for p in self.function.params if p.do_not_specialize_on_alignment}
        whole = {name for name in names if name not in free and (types[name][0] == "*" or name in _SIZES)}
        attributes = {(i,): divisible for i, name in enumerate(names) if self.aligned and name in whole}
        source = ASTSource(fn=self.function, signature=types, constexprs=constants, attrs=attributes)
        options = {"num_warps": self.warps, "num_stages": self.tile.stages if self.tile else 3}
        return triton.compile(source, target=TARGETS[self.target].gpu, options=options)


KERNELS: dict[str, Any] = {
    "plain": grouped_gemm._plain,
    "activation": grouped_gemm._activation,
    "activation_backward": grouped_gemm._activation_backward,
    "outer": grouped_outer._outer,
    "segment_sum": segment_sum._segment_sum,
    "combine_backward": segment_sum._combine_backward,
    "sort: rank": sort_experts._rank_in_block,
    "sort: scatter": sort_experts._scatter,
    "router": router._forward,
    "router backward": router._backward,
}
_SIZES = ("width", "depth", "hidden", "height", "expert_stride")
_INTEGERS = (*_SIZES, "num_rows", "bucket", "num_experts", "num_tokens", "num_ids", "blocks")
_INT64 = ("token", "source", "counts", "place", "bounds", "expert", "order", "ends", "index")
_INT32 = ("rank", "table")
_FLOAT32 = (
    "scale", "dots", "logits", "probs", "weight", "logsumexp", "prob_sums", "grad_probs", "grad_weight", "grad_prob_sum", "grad_logsumexp",
)  # fmt: skip


def _type(name: str, dtype: str) -> str:
    """An argument's type by its name."""
    if name in _INTEGERS:
        return "i32"
    kinds = {"*i64": _INT64, "*i32": _INT32, "*fp32": _FLOAT32}
    return next((kind for kind, names in kinds.items() if name in names), f"*{dtype}")


def builds() -> Iterator[Build]:
    """All of them, the default tile of each kernel first."""
    for target, info in TARGETS.items():
        tma = target in ("sm_90", "sm_100")
        cuda = info.gpu.backend == "cuda"
        shared = {"EXPERTS": 64, "GROUP": GROUP_ROWS, "PRECISION": "ieee"}
        gathered = {**shared, "GATHERED": True, "X_BOXED": False, "W_BOXED": tma}
        direct = {**shared, "GATHERED": False, "X_BOXED": tma, "W_BOXED": tma}
        swiglu = {"ACTIVATION": "silu", "GATED": True}
        gelu = {"ACTIVATION": "gelu", "GATED": False}
        plain = {"SCALED": False, "scale": None, "token": None, **direct}
        left = {**shared, "LEFT_GATHERED": True, "RIGHT_GATHERED": False, "LEFT_BOXED": False, "RIGHT_BOXED": tma}
        right = {**shared, "LEFT_GATHERED": False, "RIGHT_GATHERED": True, "LEFT_BOXED": tma, "RIGHT_BOXED": False}
        every_tile: list[tuple[str, str, dict[str, Any]]] = [
            ("plain", "forward", {**plain, "TRANSPOSED": True}),
            ("plain", "input gradient", {**plain, "TRANSPOSED": False}),
            ("activation", "gathered SwiGLU", {**gathered, **swiglu}),
            ("activation_backward", "gathered SwiGLU", {**gathered, **swiglu, "WEIGHTED": True}),
            ("outer", "left gathered", left),
            ("outer", "right gathered", right),
        ]
        for kernel, variant, constants in every_tile:
            for tile in TILES[kernel][target]:
                yield Build(target, kernel, variant, "bf16", tile, tile.warps, constants)
        default_tile: list[tuple[str, str, dict[str, Any]]] = [
            ("plain", "scaled", {**plain, "TRANSPOSED": True, "SCALED": True, "scale": "given"}),
            ("activation", "GELU", {**direct, **gelu, "token": None}),
            ("activation_backward", "GELU", {**direct, **gelu, "WEIGHTED": False, "token": None, "weight": None, "dots": None}),
            ("outer", "not gathered", {**left, "LEFT_GATHERED": False, "source": None}),
        ]
        for kernel, variant, constants in default_tile:
            tile = TILES[kernel][target][0]
            given = {name: value for name, value in constants.items() if value != "given"}
            yield Build(target, kernel, variant, "fp16", tile, tile.warps, given)
        for kernel, variant, constants in every_tile:
            tile = HARD[target]
            hard = {name: False if name.endswith("_BOXED") else value for name, value in constants.items()}
            yield Build(target, kernel, f"{variant}, odd sizes", "bf16", tile, tile.warps, hard, aligned=False)
            yield Build(target, kernel, variant, "fp32", tile, tile.warps, {**hard, "PRECISION": "tf32x3" if cuda else "ieee"})
        combine = {"bounds": None, "PER_TOKEN": 8, "RAGGED": False, "WEIGHTED": True, "BLOCK": segment_sum.LARGEST_BLOCK}
        ragged = {"PER_TOKEN": 0, "RAGGED": True, "WEIGHTED": False, "BLOCK": segment_sum.LARGEST_BLOCK, "weight": None}
        yield Build(target, "segment_sum", "8 weighted rows per token", "bf16", None, 8, combine)
        yield Build(target, "segment_sum", "ragged", "bf16", None, 8, ragged)
        yield Build(target, "combine_backward", "weighted", "bf16", None, 8, {"BLOCK": segment_sum.LARGEST_BLOCK})
        for kernel in ("sort: rank", "sort: scatter"):
            yield Build(target, kernel, "int64", "i64", None, sort_experts.WARPS, {"BLOCK": sort_experts.BLOCK})
        for experts, top_k in ((64, 6), (256, 8)):
            tokens = router.ENTRIES // experts
            sizes = {"TOP_K": top_k, "RENORMALISE": True, "TOKENS": tokens, "EXPERTS": experts}
            terms = {"OF_PROBS": True, "OF_WEIGHT": True, "OF_PROB_SUM": True, "OF_LOGSUMEXP": True}
            variant = f"{top_k} of {experts}"
            yield Build(target, "router", variant, "fp32", None, 4, {**sizes, "SLOTS": triton.next_power_of_2(top_k)})
            yield Build(target, "router backward", variant, "fp32", None, 4, {**sizes, **terms})


def pairwise(every: Iterable[Build]) -> list[Build]:
    """Few builds in which every two of (target, kernel, dtype, place of the tile) meet that meet in all, and every variant occurs."""
    missing = {build: _pairs(build) for build in every}
    chosen = []
    while any(missing.values()):
        best = max(missing, key=lambda build: len(missing[build]))
        chosen.append(best)
        covered = missing.pop(best)
        missing = {build: pairs - covered for build, pairs in missing.items()}
    return chosen


def _pairs(build: Build) -> set[tuple[object, ...]]:
    tile = None if build.tile is None else [*TILES[build.kernel][build.target], HARD[build.target]].index(build.tile)
    factors = enumerate((build.target, build.kernel, build.dtype, tile))
    return {*itertools.combinations(factors, 2), (build.kernel, build.variant)}


def measure(build: Build) -> dict[str, Any]:
    """Compiles; a row of the table, with its faults in words."""
    compiled = build.compile()
    target = TARGETS[build.target]
    used = _amd(compiled.asm["amdgcn"]) if target.gpu.backend == "hip" else _nvidia(compiled.asm["cubin"])
    code = used.pop("code")
    pattern = r"\b(HMMA|HGMMA|UTC\w*MMA|v_mfma)" if build.dtype == "fp32" else target.matrix
    row = {
        "target": build.target, "kernel": build.kernel, "variant": build.variant, "dtype": build.dtype, "warps": build.warps,
        "tile": asdict(build.tile) if build.tile else None, "shared_bytes": compiled.metadata.shared, **used,
        "matrix_instructions": len(re.findall(pattern, code)), "bulk_copies": len(re.findall(r"\bUTMALDG", code)),
    }  # fmt: skip
    row["programs"] = _resident(target, build.warps, row["registers"], row["shared_bytes"])
    row["occupancy"] = row["programs"] * build.warps / target.warps
    row["faults"] = faults(row, build)
    return row


def faults(row: dict[str, Any], build: Build) -> list[str]:
    """What a kernel must not have."""
    target = TARGETS[build.target]
    found = []
    if row["spilled_bytes"]:
        found.append(f"{row['spilled_bytes']} bytes of registers spilled")
    if row["shared_bytes"] > target.shared_program:
        found.append(f"{row['shared_bytes']} bytes of shared memory, at most {target.shared_program}")
    if build.tile and not row["matrix_instructions"]:
        found.append("no matrix instructions")
    if build.tile and not found and row["programs"] < build.tile.resident:
        found.append(f"only {row['programs']} of {build.tile.resident} programs fit a processor")
    return found


def _nvidia(cubin: bytes) -> dict[str, Any]:
    """Machine code, registers and spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    sizes = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert sizes, usage
    registers, stack, local = map(int, sizes.groups())
    return {"code": code, "registers": registers, "spilled_bytes": stack + local}


def _amd(code: str) -> dict[str, Any]:
    """Machine code, registers (those of accumulators included) and spills."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found, name
        return int(found[1])

    # scalar registers spill into lanes of vector registers, not into memory
    spilled = max(number("private_segment_fixed_size"), 4 * number("vgpr_spill_count"))
    return {"code": code, "registers": number("vgpr_count"), "spilled_bytes": spilled}


def _resident(target: Target, warps: int, registers: int, shared: int) -> int:
    """Programs that a processor holds at once."""
    width = target.gpu.warp_size
    per_warp = -(-registers // 8) * 8 * width  # registers are given out in units of 8 per thread
    limits = [target.programs, target.warps // warps, target.registers // (per_warp * warps)]
    if shared:
        limits.append(target.shared // (shared + target.shared_reserved))
    return min(limits)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line per build."""
    lines = [
        f"Triton {triton.__version__}; {len(rows)} builds, {sum(bool(row['faults']) for row in rows)} with faults.\n",
        "| target | kernel | variant | dtype | tile | warps | stages | registers | spilled | shared | matrix | bulk | programs | faults |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        tile = row["tile"]
        size, stages = (f"{tile['rows']}x{tile['columns']}x{tile['depth']}B", tile["stages"]) if tile else ("", "")
        lines.append(
            f"| {row['target']} | {row['kernel']} | {row['variant']} | {row['dtype']} | {size} | {row['warps']} | {stages} "
            f"| {row['registers']} | {row['spilled_bytes']} | {row['shared_bytes']} | {row['matrix_instructions']} "
            f"| {row['bulk_copies']} | {row['programs']} | {'; '.join(row['faults'])} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of compiled.jsonl and compiled.md")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    args = parser.parse_args()
    rows = []
    for build in builds():
        if build.target in args.target and build.kernel in args.kernel:
            rows.append(measure(build))
            print(build.target, build.name, rows[-1]["faults"] or "", flush=True)
    print(table(rows))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "compiled.jsonl").write_text("".join(json.dumps({"triton": triton.__version__, **row}) + "\n" for row in rows))
        (args.out / "compiled.md").write_text(table(rows))
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
