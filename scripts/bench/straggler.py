"""Work of the busiest rank: its processor time in one MoE layer's forward and backward, over that of the layer's bare matrix
products on perfectly spread tokens. Local gloo ranks; all that planning, gloo and copies of experts cost is counted.

usage: python scripts/bench/straggler.py [--traces zipf:1.2 uniform] [--ranks 4] [--out FILE.jsonl]
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the ranks

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from placement import Case, describe, markdown, measure, of_system, spread, write

from moetrain.testing.distributed import run_distributed


def ratio(record: dict[str, Any]) -> float:
    """Of one round; both sides are measured in the same processes, one after the other."""
    return max(record["cpu_seconds"]) / statistics.mean(record["products_cpu_seconds"])


def report(results: list[dict[str, Any]]) -> str:
    """A description and a table."""
    rows = []
    for result in results:
        first = of_system(result, result["setup"]["systems"][0], ratio)
        for name in result["setup"]["systems"]:
            own = of_system(result, name, ratio)
            rows.append(
                [
                    result["setup"]["trace"],
                    name,
                    spread(own),
                    spread([a / b for a, b in zip(own, first, strict=True)]),
                    spread(of_system(result, name, lambda record: record["rank_max_over_mean"])),
                    spread([1e3 * value for value in of_system(result, name, lambda record: max(record["cpu_seconds"]))], 0),
                    spread(
                        [1e3 * value for value in of_system(result, name, lambda record: statistics.mean(record["products_cpu_seconds"]))],
                        0,
                    ),  # fmt: skip
                ]
            )
    first = results[0]["setup"]["systems"][0]
    header = [
        "trace",
        "system",
        "busiest rank / balanced products",
        f"against {first}",
        "max/mean load",
        "busiest rank, ms",
        "products, ms",
    ]
    return "\n\n".join([*(describe(result["setup"]) for result in results), "Processor time, medians (min-max).", markdown(header, rows)])


def main() -> None:
    """Measure every trace, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Case.add_arguments(parser)
    parser.add_argument("--traces", nargs="+", default=["zipf:1.2", "uniform"])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON lines; the table goes beside it as .md")
    # without a mixer before the layer, the paper's planner would hide, and so make, no copies
    parser.set_defaults(tokens=1024, overlap_degree=2)
    options = parser.parse_args()
    case = Case.from_options(options)
    results = [run_distributed(measure, options.ranks, replace(case, trace=trace), timeout=600)[0] for trace in options.traces]
    text = report(results)
    print(text)
    if options.out is not None:
        write(options.out, results, text)


if __name__ == "__main__":
    main()
