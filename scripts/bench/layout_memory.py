"""Memory of a rank under each layout, for a model that consists of experts almost alone.

usage: python scripts/bench/layout_memory.py [--output FOLDER]
Four gloo ranks on this machine, 8 MoE layers of 16 SwiGLU experts, D=256, F=1024, float32, K=2, Zipf-1.2 routing, 2 sequences
of 64 tokens per rank, 3 training steps with AdamW. FSSDP has two extra slots, and a cost model under which they are used.
Each layout runs twice in processes of its own: once for resident memory (the kernel's VmHWM, reset before the model is
built, less VmRSS at that moment), once with torch's profiler for what the CPU allocator hands out (exact, gloo's own buffers
not included). State and copies are counted from the tensors. Writes layout_memory.json and layout_memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from moetrain.models.deepseek_moe import DeepSeekMoEConfig
from moetrain.moe.layer import MoEParts
from moetrain.parallel.layouts import FSSDPSettings, Layout
from moetrain.registry import lookup
from moetrain.testing.distributed import run_distributed
from moetrain.testing.layouts import Scenario
from moetrain.testing.memory import Memory, measure
from moetrain.testing.scenarios import DrawnConfig

RANKS, LAYERS, EXPERTS, HIDDEN, WIDTH, TOP_K, SLOTS = 4, 8, 16, 256, 1024, 2, 2
EXPERT_BYTES = 3 * HIDDEN * WIDTH * 4
MB = 1e6


def everywhere(*, rematerialize: bool) -> FSSDPSettings:
    """Settings of zero3_experts."""
    return FSSDPSettings(planner="everywhere", split="even", rematerialize=rematerialize)


LAYOUTS = {
    "fsdp": Layout("fsdp", 1, RANKS),
    "ep": Layout("ep", 1, RANKS),
    "fssdp": Layout("fssdp", 1, RANKS, FSSDPSettings(extra_slots=SLOTS)),
    "fssdp, rematerialize": Layout("fssdp", 1, RANKS, FSSDPSettings(extra_slots=SLOTS, rematerialize=True)),
    "zero3_experts": Layout("zero3_experts", 1, RANKS, everywhere(rematerialize=True)),
    "zero3_experts, rematerialize=false": Layout("zero3_experts", 1, RANKS, everywhere(rematerialize=False)),
}


def scenario() -> Scenario:
    """The model and its data."""
    model = DeepSeekMoEConfig(
        hidden_size=HIDDEN, num_layers=LAYERS, num_heads=4, head_dim=64, num_experts=EXPERTS, top_k=TOP_K, expert_width=WIDTH,
        shared_width=0, dense_layers=0, dense_width=WIDTH, init_std=0.02,
    )  # fmt: skip
    parts = MoEParts(
        router=DrawnConfig(skew="zipf", top_k=TOP_K),
        experts=lookup("experts", "ffn")(num_experts=EXPERTS, width=WIDTH),
        capacity=lookup("capacity", "none")(),
    )
    return Scenario(model, parts, vocab_size=256, batch_size=2 * RANKS, seq_len=64, steps=3, dtype=torch.float32, lr=1e-3)


def run(name: str, *, trace: bool) -> list[Memory]:
    """One layout in fresh processes. Freed blocks go back to the system at once, so that resident memory means something."""
    command = [sys.executable, __file__, "--one", name, *(["--trace"] if trace else [])]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [Memory(**memory) for memory in json.loads(done.stdout.splitlines()[-1])]


def markdown(measured: dict[str, list[Memory]]) -> str:
    """One row per layout: the largest figure of any rank."""
    state = LAYERS * EXPERTS * EXPERT_BYTES * 4 / MB
    lines = [
        f"Largest of {RANKS} ranks, MB = 10^6 bytes; experts of the whole model with gradients and moments: {state:.0f} MB, "
        f"a quarter of it {state / RANKS:.0f} MB, one expert's parameters {EXPERT_BYTES / MB:.2f} MB.",
        "",
        "| layout | experts: parameters, gradients, moments | copies at their peak | allocated at the peak | end of forward | "
        "resident at the peak |",
        "|---|---|---|---|---|---|",
    ]
    for name, memories in measured.items():
        largest = [
            max(getattr(m, field) for m in memories) / MB for field in ("experts", "copies", "allocated", "after_forward", "resident")
        ]
        lines.append(f"| {name} | {' | '.join(f'{size:.0f}' for size in largest)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="memory of a rank under each layout")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu")
    parser.add_argument("--one", choices=LAYOUTS, help="internal: measure this layout only and print JSON")
    parser.add_argument("--trace", action="store_true")
    options = parser.parse_args()
    if options.one:
        memories = run_distributed(measure, RANKS, scenario(), LAYOUTS[options.one], options.trace, timeout=400.0)
        print(json.dumps([asdict(memory) for memory in memories]))
        return
    measured = {}
    for name in LAYOUTS:
        resident, traced = run(name, trace=False), run(name, trace=True)
        pairs = zip(resident, traced, strict=True)
        measured[name] = [Memory(r.experts, r.dense, r.copies, r.resident, t.allocated, t.after_forward) for r, t in pairs]
        print(name, measured[name], file=sys.stderr, flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    environment = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
    result = {
        "command": "python scripts/bench/layout_memory.py",
        "environment": environment,
        "unit": "bytes",
        "expert_bytes": EXPERT_BYTES,
        "ranks": {name: [asdict(m) for m in memories] for name, memories in measured.items()},
    }
    (options.output / "layout_memory.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = f"`python scripts/bench/layout_memory.py`, torch {torch.__version__}, gloo.\n\n{markdown(measured)}\n"
    (options.output / "layout_memory.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
