"""Share of CPU time that a training step spends in matrix products and attention.

usage: python scripts/bench/profile_step.py [steps before] [profiled steps] [overrides of moetrain train]
Profiles the default run (steps 10 to 20 by default) on one thread with torch.profiler and prints the largest operations.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from moetrain.launch.compose import build_config, run_application
from moetrain.parallel.ranks import Ranks
from moetrain.train.run import Trainer, prepare

PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "_grouped_mm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


def profile(plain: dict[str, Any], *, before: int, steps: int) -> None:
    """Train ``before`` steps, then profile ``steps``."""
    torch.set_num_threads(1)
    config = build_config(plain)
    config.logging.display = "none"
    with tempfile.TemporaryDirectory() as folder, Trainer.start(config, Ranks(), Path(folder), prepare(config.data)) as trainer:
        trainer.resume()
        for _ in range(before):
            trainer.train_step(lambda: None)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(steps):
                trainer.train_step(lambda: None)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    products = sum(event.self_cpu_time_total for event in events if event.key.removeprefix("aten::") in PRODUCTS)
    print(f"matrix products and attention: {products / total:.1%} of {total / steps / 1e6:.3f} s self CPU time per step")
    for event in events[:15]:
        print(f"  {event.self_cpu_time_total / total:6.1%}  {event.key}")


if __name__ == "__main__":
    numbers = [int(a) for a in sys.argv[1:3] if a.isdigit()]
    before, steps = [*numbers, *(9, 11)[len(numbers) :]]
    run_application(sys.argv[1 + len(numbers) :], lambda plain: profile(plain, before=before, steps=steps))
