"""One MoE layer, forward and backward, by moetrain and by other implementations in the same run.

Each implementation is a worker process in its own environment (peers/worker.py with peers/<name>.py); all read the same saved
inputs, and one whose results are wrong is not timed. Measured in rounds over all of them, each step right after the layer's bare
matrix products (the dense limit), which have a process too. Time over that limit is what is reported, wall and processor time.

usage: python scripts/bench/layer.py [--shapes 1024,512,1536,8,2 ...] [--precisions float32 ...] [--routings balanced zipf:1.2]
       [--systems moetrain grouped_mm ...] [--python transformers=/path/to/python ...] [--rounds 9] [--out FILE.jsonl]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moetrain.testing.layer_bench import (
    PRECISIONS,
    LayerCase,
    Pair,
    Seconds,
    expected_results,
    interleave,
    make_inputs,
    shared_rounds,
    spread,
)

OWN = "moetrain"
SYSTEMS = (OWN, "loop", "grouped_mm", "transformers", "transformers:eager", "torchtitan", "torchtitan:float32", "megatron",
           "megatron:allgather", "deepspeed", "tutel", "scattermoe", "sonicmoe", "megablocks")  # fmt: skip
SHAPES = ("1024,512,1536,8,2", "2048,512,1024,16,2", "1024,512,256,64,8", "4096,512,256,64,8", "8192,512,512,32,4")
ALLOCATOR = ("THP_MEM_ALLOC_ENABLE", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")
"""Environment variables that change how fast new memory is; workers inherit them."""

HERE = Path(__file__).parent


class WorkerProcess:
    """A worker and the pipes to it. about: its versions. failed: why it is of no more use, or None."""

    about: dict[str, Any]
    failed: str | None

    def __init__(
        self, name: str, python: str, device: str, threads: int, log: Path, patience: float, variables: Mapping[str, str] | None = None
    ) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE.parents[1]), **(variables or {})}
        self.patience, self.failed = patience, None
        self.process = subprocess.Popen(
            [python, "-P", str(HERE / "peers" / "worker.py"), name, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            env=environment,
        )

    def greet(self) -> WorkerProcess:
        """Wait until it is ready, or has failed; itself. Several can start at once."""
        self.about = self.receive()
        self.failed = self.about.get("failed")
        return self

    def receive(self) -> dict[str, Any]:
        """The next answer, or ``failed`` with the reason."""
        if self.failed is not None:
            return {"failed": self.failed}
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], self.patience)[0]:
            self.process.kill()
            self.process.wait()
            self.failed = f"no answer within {self.patience:.0f} s"
            return {"failed": self.failed}
        line = self.process.stdout.readline()
        if not line:
            self.failed = f"exited with status {self.process.wait()}"
            return {"failed": self.failed}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def send(self, do: str, **arguments: Any) -> None:
        """One command, unless the worker has failed."""
        assert self.process.stdin is not None
        if self.failed is None:
            with contextlib.suppress(BrokenPipeError):  # receive() says how it ended
                self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
                self.process.stdin.flush()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        self.send(do, **arguments)
        return self.receive()

    def run(self) -> Seconds:
        """One timed step."""
        answer = self.ask("run")
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return Seconds(answer["wall"], answer["cpu"])

    def hang_up(self) -> None:
        """No more commands; the process ends."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # of a command that a dead worker never read
            self.process.stdin.close()

    def close(self) -> None:
        """End the process."""
        self.hang_up()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def measure(case: LayerCase, workers: Mapping[str, WorkerProcess], options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of one case, one for each system."""
    files = {"inputs": str(folder / "inputs.safetensors"), "expected": str(folder / "expected.safetensors")}
    inputs = make_inputs(case)
    save_file(inputs, files["inputs"])
    expected = expected_results({name: t.to(options.device) for name, t in inputs.items()}, case.top_k)
    save_file({name: t.float().contiguous() for name, t in expected.items()}, files["expected"])
    plain = dataclasses.asdict(case)
    rows, timed = [], {}
    for name, worker in workers.items():
        loaded = worker.ask("load", case=plain, warmup=options.warmup, **files)
        if "failed" not in loaded and loaded.get("error", 0.0) > 1:
            loaded["failed"] = f"wrong: the error of {loaded['worst']} is {loaded['error']:.3g} times what is allowed"
        if name not in ("dense", "copy"):
            rows.append({"system": name, **plain, **worker.about, **loaded})
        if "failed" not in loaded:
            timed[name] = worker
    limit, copy = timed.pop("dense"), timed.pop("copy")
    copies = [copy.run() for _ in range(options.rounds)]
    pairs = interleave({name: worker.run for name, worker in timed.items()}, limit.run, options.rounds, slow=options.slow)
    for row in rows:
        if row["system"] in pairs:
            row["pairs"] = pairs[row["system"]]
            row["limit_seconds"] = statistics.median(pair.limit.wall for pair in row["pairs"])
            row["copy_limit_seconds"] = statistics.median(seconds.wall for seconds in copies)
    return rows


def table(
    header: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    case_of: Callable[[Mapping[str, Any]], Sequence[str]],
    cells: Callable[[Mapping[str, Any]], Sequence[str]],
) -> str:
    """Markdown of the rows that were measured: case, system, cells; then a list of those that were not."""
    lines = [header, ["---"] * len(header)]
    failures: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "pairs" in row:
            lines.append([*case_of(row), f"{row['system']} {row['version'] or ''}".strip(), *cells(row)])
        else:
            failures.setdefault((row["system"], row["failed"]), []).append(" ".join(case_of(row)))
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    cases = len({tuple(case_of(row)) for row in rows})
    missing = [f"- {name}: {why}" + ("" if len(where) == cases else f" ({'; '.join(where)})") for (name, why), where in failures.items()]
    return "\n".join([text, *(["", "Not measured:", "", *missing] if missing else [])])


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table; ratios are medians (minimum-maximum) over the rounds."""
    header = ["T, D, F, E, K", "precision", "routing", "system", "CPU time / limit", "wall time / limit", "CPU time / moetrain's",
              "peak MB", "limit ms", "copies / limit"]  # fmt: skip

    def case_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
        return ", ".join(str(row[name]) for name in ("tokens", "hidden", "width", "experts", "top_k")), row["precision"], row["routing"]

    own = {case_of(row): row.get("pairs") for row in rows if row["system"] == OWN}

    def cells(row: Mapping[str, Any]) -> list[str]:
        pairs: list[Pair] = row["pairs"]
        ours = own.get(case_of(row))
        return [
            spread([pair.cpu for pair in pairs]),
            spread([pair.wall for pair in pairs]),
            spread([a.own.cpu / b.own.cpu for a, b in shared_rounds(pairs, ours)]) if ours else "",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{1e3 * row['limit_seconds']:.0f}",
            f"{row['copy_limit_seconds'] / row['limit_seconds']:.2f}",
        ]

    return table(header, rows, case_of, cells)


def describe(options: argparse.Namespace) -> str:
    """Machine and setting."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    allocator = ", ".join(f"{name}={os.environ[name]}" for name in ALLOCATOR if name in os.environ) or "default"
    return (
        f"Forward and backward of one MoE layer on {device}; threads of a process: {options.threads}; allocator settings: {allocator}; "
        f"{options.rounds} interleaved rounds after {options.warmup} warm-up steps, load average at the end {os.getloadavg()[0]:.1f}. "
        "Medians (minimum-maximum) of ratios within a round. A system that takes more than "
        f"{options.slow:g} times the limit is measured in three rounds."
    )


PEAK = (
    "Peak: memory handed out by torch's allocator during a step, above weights and inputs, gradients included; scratch memory of the "
    "matrix library is not."
)


def add_arguments(parser: argparse.ArgumentParser, *, shapes: Sequence[str], systems: Sequence[str]) -> None:
    """What this benchmark and ep_layer.py are told."""
    parser.add_argument("--shapes", nargs="+", default=shapes, metavar="T,D,F,E,K")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--routings", nargs="+", default=("balanced", "zipf:1.2"))
    parser.add_argument("--systems", nargs="+", default=systems, help="adapters in peers/, NAME or NAME:VARIANT")
    parser.add_argument("--python", nargs="+", default=[], metavar="NAME=PATH", help="interpreters of systems; default: this one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the rounds, after the one whose results are checked")
    parser.add_argument("--slow", type=float, default=3.0)
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait for one answer of a worker")
    parser.add_argument("--out", type=Path, help="JSON lines; the table goes beside it as .md")


def write(path: Path, rows: Sequence[Mapping[str, Any]], text: str) -> None:
    """JSON lines, and the table beside them."""
    allocator = {name: os.environ[name] for name in ALLOCATOR if name in os.environ}
    setup = {"machine": platform.machine(), "cores": os.cpu_count(), "allocator": allocator}
    path.write_text("".join(json.dumps({**row, **setup}) + "\n" for row in rows), encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def main() -> None:
    """Measure all cases, print and write; what is done is written before the next case begins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, shapes=SHAPES, systems=SYSTEMS)
    options = parser.parse_args()
    pythons = dict(entry.split("=", 1) for entry in options.python)
    rows: list[dict[str, Any]] = []
    workers: dict[str, WorkerProcess] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in ("dense", "copy", *options.systems):
                python = pythons.get(name.partition(":")[0], sys.executable)
                log = Path(folder) / f"{name}.log"
                workers[name] = WorkerProcess(name, python, options.device, options.threads, log, options.patience)
            for worker in workers.values():
                worker.greet()
            for shape, precision, routing in itertools.product(options.shapes, options.precisions, options.routings):
                case = LayerCase(*map(int, shape.split(",")), precision=precision, routing=routing)
                rows += measure(case, workers, options, Path(folder))
                print(report(rows[-len(options.systems) :]), flush=True)
                text = f"{describe(options)} {PEAK}\n\n{report(rows)}\n"
                if options.out is not None:
                    write(options.out, rows, text)
        finally:
            for worker in workers.values():
                worker.close()
    print(f"\n{text}")


if __name__ == "__main__":
    main()
