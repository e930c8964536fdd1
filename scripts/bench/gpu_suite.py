"""The parts of scripts/gpu_suite.sh: correctness on the device against the CPU, then timings and memory.

Needs torch alone. Each part writes <part>.json; a part that fails is recorded with its traceback and the others run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import moetrain.models
import moetrain.moe.losses  # noqa: F401
from moetrain.models.deepseek_moe import DeepSeekMoEConfig
from moetrain.moe.context import ForwardContext
from moetrain.moe.layer import MoEParts
from moetrain.objectives.batch import Batch
from moetrain.objectives.language_modeling import LanguageModelingConfig
from moetrain.parallel.layouts import Layout
from moetrain.parallel.parallelize import ParallelModel, parallelize
from moetrain.parallel.ranks import Ranks
from moetrain.registry import lookup
from moetrain.train.flops import FlopCounter, count_parameters, peak_flops
from moetrain.train.metrics import Phases
from moetrain.train.optim import AdamWConfig
from moetrain.train.step import accumulate_gradients, count_units

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def timed(action: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median and spread in seconds after two warm-up calls."""
    action(), action()
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        action()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def parts(num_experts: int, top_k: int, width: int) -> MoEParts:
    return MoEParts(
        router=lookup("router", "topk")(top_k=top_k, renormalise=True),
        experts=lookup("experts", "ffn")(num_experts=num_experts, width=width),
        capacity=lookup("capacity", "none")(),
        loss={"balance": lookup("loss", "expert_balance")(coefficient=0.01)},
    )


def place(config: DeepSeekMoEConfig, dtype: torch.dtype, device: torch.device, vocab_size: int) -> tuple[ParallelModel, FlopCounter, int]:
    with torch.device("meta"):
        model = config.build(parts(config.num_experts, config.top_k, config.expert_width), vocab_size=vocab_size, dtype=dtype)
    flops, size = FlopCounter(model), count_parameters(model)
    placed = parallelize(model, Layout("single", 1, 1), Ranks(), device=device)
    placed.initialise(0)
    return placed, flops, size


def random_batch(batch: int, seq_len: int, vocab_size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (batch, seq_len + 1), generator=generator)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.arange(batch))


def step(placed: ParallelModel, batches: list[Batch]) -> tuple[float, float]:
    """Forward, backward and gradient norm of one step; (loss, norm)."""
    totals, _ = count_units(batches, placed)
    for _, parameter in placed.parameters():
        parameter.grad = None
    objective = LanguageModelingConfig().build()
    result = accumulate_gradients(placed, objective, batches, totals, seed=0, step=0, total_steps=1, phases=Phases())
    return result.loss, placed.clip_gradients(None).item()


def correctness(size: str) -> dict[str, Any]:
    """A small model's loss and gradient norm on the device against float64 on the CPU.

    In bfloat16 only the loss is compared: choices near a tie may differ, which moves the norm.
    """
    config = DeepSeekMoEConfig(hidden_size=64, num_layers=3, num_heads=2, head_dim=32, num_experts=8, top_k=2, expert_width=64,
                               shared_width=64, dense_width=128, init_std=0.1)  # fmt: skip
    batches = [random_batch(4, 64, 256)]
    reference = step(place(config, torch.float64, torch.device("cpu"), 256)[0], batches)
    report: dict[str, Any] = {"reference": reference}
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
        found = step(place(config, dtype, DEVICE, 256)[0], batches)
        compared = 1 if dtype == torch.bfloat16 else 2
        error = max(abs(a - b) / abs(b) for a, b in zip(found[:compared], reference, strict=False))
        report[str(dtype)] = {"loss": found[0], "norm": found[1], "relative_error": error, "passed": error <= tolerance}
    report["passed"] = all(entry["passed"] for entry in report.values() if isinstance(entry, dict))
    return report


def layer(size: str) -> dict[str, Any]:
    """Forward and backward of one MoE layer, and the rate of a dense product with the same FLOPs."""
    shapes = [(1024, 64, 64, 8, 2)] if size == "tiny" else [(16384, 2048, 1408, 64, 6), (16384, 4096, 14336, 8, 2)]
    rows = []
    for tokens, hidden, width, experts, top_k in shapes:
        with torch.device(DEVICE):
            moe = parts(experts, top_k, width).build(hidden, dtype=torch.float32)
            for parameter in moe.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            x = torch.randn(1, tokens, hidden, dtype=torch.bfloat16, requires_grad=True)

        def run() -> None:
            moe(x, ForwardContext(batch_size=1, seq_len=tokens, training=True).at("layer")).square().mean().backward()  # noqa: B023

        time_layer = timed(run, 5)
        flops = 3 * tokens * top_k * moe.experts.flops_per_row()
        a = torch.randn(tokens * top_k, hidden, dtype=torch.bfloat16, device=DEVICE)
        b = torch.randn(hidden, width, dtype=torch.bfloat16, device=DEVICE)
        dense = timed(lambda: a @ b, 5)  # noqa: B023
        rate = 2 * a.shape[0] * hidden * width / dense["median"]
        rows.append({"shape_T_D_F_E_K": [tokens, hidden, width, experts, top_k], "seconds": time_layer,
                     "flops_per_second": flops / time_layer["median"], "dense_flops_per_second": rate,
                     "share_of_dense": flops / time_layer["median"] / rate})  # fmt: skip
    return {"rows": rows, "passed": True}


def training(size: str) -> dict[str, Any]:
    """Steps of a 1B-class model with AdamW in bfloat16: tokens/s, utilisation, peak memory, falling loss."""
    if size == "tiny":
        config = DeepSeekMoEConfig(hidden_size=64, num_layers=2, num_heads=2, head_dim=32, num_experts=8, top_k=2, expert_width=64,
                                   shared_width=64, dense_width=128, init_std=0.02)  # fmt: skip
        vocab_size, batches, steps = 256, [random_batch(2, 64, 256)], 3
    else:
        config = DeepSeekMoEConfig(hidden_size=1280, num_layers=9, num_heads=10, head_dim=128, num_experts=32, top_k=4, expert_width=856,
                                   shared_width=856, dense_layers=1, dense_width=3424)  # fmt: skip
        vocab_size, batches, steps = 32000, [random_batch(8, 2048, 32000)], 12
    placed, flops, parameters = place(config, torch.bfloat16, DEVICE, vocab_size)
    optimizer = AdamWConfig(lr=3e-4).build(placed)
    objective = LanguageModelingConfig().build()
    losses, seconds = [], []
    for index in range(steps):
        synchronize()
        start = time.perf_counter()
        totals, _ = count_units(batches, placed)
        optimizer.zero_grad(set_to_none=True)
        result = accumulate_gradients(placed, objective, batches, totals, seed=0, step=index, total_steps=steps, phases=Phases())
        placed.clip_gradients(1.0)
        optimizer.step()
        synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(result.loss)
    rows = {name: int(stats.dispatched.sum()) for name, stats in result.statistics.items()}
    median = statistics.median(seconds[2:] or seconds)
    rate = flops.step(result.tokens, batches[0].tokens.shape[1], rows) / median
    peak = peak_flops(DEVICE)
    return {
        "parameters": parameters, "losses": losses, "step_seconds": seconds, "tokens_per_second": result.tokens / median,
        "model_flops_per_second": rate, "model_flops_utilisation": rate / peak if peak else None,
        "memory_peak_bytes": torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else None, "passed": losses[-1] < losses[0],
    }  # fmt: skip


def main() -> None:
    """Run all parts; exit status 1 if one failed."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--size", choices=("full", "tiny"), default="full")
    options = arguments.parse_args()
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine()
    summary: dict[str, Any] = {"device": device, "torch": torch.__version__, "python": platform.python_version(), "size": options.size}
    for part in (correctness, layer, training):
        try:
            report = part(options.size)
        except Exception:
            report = {"passed": False, "traceback": traceback.format_exc()}
        (options.out / f"{part.__name__}.json").write_text(json.dumps(report, indent=1))
        summary[part.__name__] = report["passed"]
        print(part.__name__, json.dumps(report, indent=1), flush=True)
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary))
    raise SystemExit(not all(summary[part.__name__] for part in (correctness, layer, training)))


if __name__ == "__main__":
    main()
