"""Step time of two checkouts of this repository, step by step in turns, so that both meet the same load of the machine.

usage: python scripts/bench/compare_steps.py BASE NEW [--steps 20] [overrides of moetrain train]
Each checkout trains the default run in a process of its own on one thread. Prints medians and the ratio of each pair of steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WARM_UP = 3
CHILD = "--as-child"


def child(plain: dict[str, Any]) -> None:
    """Train one step for every line of standard input, and write its figures."""
    import torch

    from moetrain.launch.compose import build_config
    from moetrain.parallel.ranks import Ranks
    from moetrain.train.run import Trainer, prepare

    torch.set_num_threads(1)
    config = build_config(plain)
    config.logging.display = "none"
    with tempfile.TemporaryDirectory() as folder, Trainer.start(config, Ranks(), Path(folder), prepare(config.data)) as trainer:
        trainer.resume()
        for _ in sys.stdin:
            start, wall = time.process_time(), time.perf_counter()
            trainer.train_step(lambda: None)
            figures = {"cpu": time.process_time() - start, "wall": time.perf_counter() - wall}
            line = json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])
            print(json.dumps({**figures, **line["seconds"]}), flush=True)


def measure(trees: Sequence[Path], steps: int, overrides: Sequence[str]) -> list[list[dict[str, float]]]:
    """Figures of each step of each checkout."""
    children = []
    for tree in trees:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), CHILD, *overrides]
        children.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=tree))
    rows: list[list[dict[str, float]]] = [[] for _ in trees]
    for _ in range(WARM_UP + steps):
        for row, process in zip(rows, children, strict=True):
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("step\n")
            process.stdin.flush()
            row.append(json.loads(process.stdout.readline()))
    for process in children:
        process.communicate()
    return [row[WARM_UP:] for row in rows]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    options, overrides = parser.parse_known_args(arguments)
    base, new = measure([options.base.resolve(), options.new.resolve()], options.steps, overrides)
    print(f"seconds per step, medians of {options.steps}; load average {os.getloadavg()[0]:.1f}\n")
    print("| | base | new |\n| --- | --- | --- |")
    for name in new[-1]:
        print(f"| {name} | {statistics.median(r.get(name, 0.0) for r in base):.4f} | {statistics.median(r[name] for r in new):.4f} |")
    ratios = [n["cpu"] / b["cpu"] for b, n in zip(base, new, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"\nnew over base by processor time, pairs of steps: {middle:.3f} (quartiles {low:.3f}-{high:.3f})")


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        from moetrain.launch.compose import run_application

        run_application(sys.argv[2:], child)
    else:
        main(sys.argv[1:])
