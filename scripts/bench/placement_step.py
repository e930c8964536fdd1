"""Step time of one MoE layer with its experts placed by several systems, on the ranks that torchrun or emulate_cluster.py
starts. What it shows about speed is an emulation: nodes share processors, links are limited by token buckets.

usage: scripts/bench/emulate_cluster.py -- python scripts/bench/placement_step.py [--trace zipf:1.2] [--window 8] [--out FILE.jsonl]
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from placement import Case, describe, markdown, measure, of_system, spread, write


def bytes_between_nodes(record: dict[str, Any]) -> int:
    """Of all ranks and kinds of collectives."""
    return sum(count for kinds in record["bytes"] for kind, count in kinds.items() if kind.endswith(".inter"))


def report(result: dict[str, Any]) -> str:
    """A description and a table."""
    systems, ranks = result["setup"]["systems"], len(result["setup"]["nodes"])
    steps = {name: of_system(result, name, lambda record: max(record["seconds"])) for name in systems}
    rows = []
    for name in systems:
        against = [first / own for first, own in zip(steps[systems[0]], steps[name], strict=True)]
        waited = of_system(result, name, lambda record: sum(sum(kinds.values()) for kinds in record["waited"]) / ranks)
        gathering = of_system(result, name, lambda record: max(kinds.get("sparse_all_gather", 0.0) for kinds in record["waited"]))
        crossing = of_system(result, name, bytes_between_nodes)
        rows.append(
            [
                name,
                spread(steps[name]),
                spread(against),
                spread(of_system(result, name, lambda record: record["modelled_seconds"])),
                spread(waited),
                f"{spread(gathering)} of {result['transfer_seconds'][name]:.2f}",
                spread([n / 1e6 for n in crossing], 1),
                spread(of_system(result, name, lambda record: record["rank_max_over_mean"])),
                spread(of_system(result, name, lambda record: record["copies"]), 0),
                spread(of_system(result, name, lambda record: max(record["cpu_seconds"]))),
            ]
        )
    header = [
        "system", "step, s", f"speed-up over {systems[0]}", "modelled step, s", "waiting in collectives, mean rank, s",
        "of it for copies, slowest rank, s, of their transfer alone", "between nodes, MB", "max/mean load", "copies",
        "CPU time, busiest rank, s",
    ]  # fmt: skip
    return f"Emulation. {describe(result['setup'])} Medians (min-max).\n\n{markdown(header, rows)}"


def main() -> None:
    """Measure on all ranks; rank 0 prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Case.add_arguments(parser)
    parser.add_argument("--out", type=Path, help="JSON lines; the table goes beside it as .md")
    parser.set_defaults(window=8)
    options = parser.parse_args()
    case = Case.from_options(options)
    if case.inter_bandwidth is None and "EMULATED_BYTES_PER_SECOND" in os.environ:
        case = replace(case, inter_bandwidth=float(os.environ["EMULATED_BYTES_PER_SECOND"]))
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    result = measure(dist.get_rank(), dist.get_world_size(), case)
    if dist.get_rank() == 0:
        result["setup"]["kind"] = "emulation"
        text = report(result)
        print(text, flush=True)
        if options.out is not None:
            write(options.out, [result], text)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
