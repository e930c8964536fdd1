"""What the Triton kernels can reach on an H100 on paper: bytes and FLOPs of each, and how much of the machine its tiles use.

Two limits per kernel: bytes that must move (every operand once) over the memory's rate, and FLOPs over the dense bfloat16
rate. Two shares say what is lost between them: ``tiles`` is useful over computed results (an expert's last tile is partly
empty), ``waves`` is tiles over places in all waves of a persistent grid. ``traffic`` is what one processor asks of the
second-level cache per second while it multiplies at full rate: beyond about a 132th of that cache's rate it would wait.

usage: python scripts/bench/kernel_limits.py [--shape T D F E K] [--compiled scripts/bench/results/compiled/compiled.jsonl]
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEMORY, FLOPS, PROCESSORS = 3.35e12, 989e12, 132
"""H100 SXM data sheet: bytes/s, dense bfloat16 FLOP/s, SMs."""
SHAPES = [(16384, 2048, 1408, 64, 6), (8192, 4096, 14336, 8, 2)]
"""T, D, F, E, K of fine and coarse experts."""


@dataclass(frozen=True)
class Work:
    """One launch: E products of [rows, depth] and [depth, columns] each (none: bytes only)."""

    kernel: str
    what: str
    bytes_moved: float
    rows: float = 0
    columns: int = 0
    depth: float = 0
    products: int = 0
    fused: int = 1
    """Products that share one tile of left operands (gate and up)."""

    @property
    def flops(self) -> float:
        """Multiplications and additions."""
        return 2 * self.products * self.rows * self.columns * self.depth * self.fused

    @property
    def seconds(self) -> tuple[float, float]:
        """The two limits: memory, arithmetic."""
        return self.bytes_moved / MEMORY, self.flops / FLOPS

    def shares(self, tile: dict[str, int], programs: int) -> tuple[float, float, float]:
        """Shares of useful results and of filled waves, and bytes/s per processor from the second-level cache at full rate."""
        across, down = math.ceil(self.columns / tile["columns"]), math.ceil(self.rows / tile["rows"])
        useful = self.rows * self.columns / (across * down * tile["rows"] * tile["columns"])
        count, places = self.products * across * down, PROCESSORS * programs
        filled = count / (math.ceil(count / places) * places)
        loaded = 2 * (tile["rows"] + self.fused * tile["columns"]) * self.depth  # two bytes per element
        computed = 2 * tile["rows"] * tile["columns"] * self.depth * self.fused
        return useful, filled, loaded / (computed / (FLOPS / PROCESSORS))


def work(tokens: int, width: int, hidden: int, experts: int, top_k: int) -> list[Work]:
    """All launches of forward and backward of the SwiGLU expert block in bfloat16, experts evenly loaded."""
    rows = tokens * top_k
    each = rows / experts
    x, y, h, a = 2 * tokens * width, 2 * rows * width, 4 * rows * hidden, 2 * rows * hidden
    w_in, w_out, logits = 4 * experts * hidden * width, 2 * experts * hidden * width, 4 * tokens * experts
    return [
        Work("router", "forward", 2 * logits + 12 * tokens * top_k),
        Work("sort", "both launches", 40 * rows),
        Work("activation", "forward", x + w_in + h + a, each, hidden, width, experts, fused=2),
        Work("plain", "forward", a + w_out + y, each, width, hidden, experts),
        Work("segment_sum", "combine", y + x, 0),
        Work("activation_backward", "gathered SwiGLU", x + w_out + h + h + a, each, hidden, width, experts),
        Work("outer", "left gathered", x + a + w_out, width, hidden, each, experts),
        Work("outer", "right gathered", h + x + w_in, 2 * hidden, width, each, experts),
        Work("plain", "input gradient", h + w_in + y, each, width, 2 * hidden, experts),
        Work("segment_sum", "input gradient", y + x, 0),
    ]


def table(shape: tuple[int, int, int, int, int], compiled: list[dict[str, Any]]) -> str:
    """Markdown. compiled: rows of compile_kernels.py."""
    launches = work(*shape)
    lines = [
        f"T={shape[0]}, D={shape[1]}, F={shape[2]}, E={shape[3]}, K={shape[4]}:\n",
        "| kernel | | bytes (MB) | FLOPs (T) | memory (ms) | arithmetic (ms) | tile | programs | tiles | waves | traffic (GB/s) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for launch in launches:
        memory, arithmetic = (1e3 * seconds for seconds in launch.seconds)
        cells = [launch.kernel, launch.what, f"{launch.bytes_moved / 1e6:.0f}", f"{launch.flops / 1e12:.2f}", f"{memory:.3f}"]
        rows = [r for r in compiled if (r["target"], r["kernel"], r["dtype"]) == ("sm_90", launch.kernel, "bf16") and r["tile"]]
        if launch.products:
            found = rows[0]  # the default tile comes first
            useful, filled, traffic = launch.shares(found["tile"], found["programs"])
            size = f"{found['tile']['rows']}x{found['tile']['columns']}"
            cells += [f"{arithmetic:.3f}", size, str(found["programs"]), f"{useful:.2f}", f"{filled:.2f}", f"{traffic / 1e9:.0f}"]
        else:
            cells += [""] * 6
        lines.append(f"| {' | '.join(cells)} |")
    memory, arithmetic = (1e3 * sum(launch.seconds[i] for launch in launches) for i in (0, 1))
    bound = 1e3 * sum(max(launch.seconds) for launch in launches)
    lines.append(f"\nSum: memory {memory:.2f} ms, arithmetic {arithmetic:.2f} ms; the larger of the two launch by launch {bound:.2f} ms,")
    lines.append(
        f"of which arithmetic alone is {arithmetic / bound:.0%}: the best share of the dense rate without fusing launches further."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=5, type=int, action="append", metavar=("T", "D", "F", "E", "K"))
    default = Path(__file__).parent / "results" / "compiled" / "compiled.jsonl"
    parser.add_argument("--compiled", type=Path, default=default, help="rows of compile_kernels.py")
    args = parser.parse_args()
    compiled = [json.loads(line) for line in args.compiled.read_text().splitlines()]
    print("\n".join(table(tuple(shape), compiled) for shape in args.shape or SHAPES))


if __name__ == "__main__":
    main()
