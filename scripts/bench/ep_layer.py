"""One MoE layer under expert parallelism, by moetrain and by other libraries in the same run: local ranks, one group of worker
processes for each system (see layer.py), its ranks' tokens and experts cut from the same saved inputs.

Reported: tokens per second; processor time of the mean and of the busiest rank over the bare matrix products of perfectly spread
rows, which the ranks compute at the same time just before; bytes that ranks write to each other over the least that this routing
needs when each row that leaves its rank travels by itself, out and back, forward and backward.

usage: python scripts/bench/ep_layer.py [--ranks 2 4] [--shapes 1024,512,1024,16,2 ...] [--precisions float32 ...]
       [--routings balanced zipf:1.2] [--systems moetrain megatron ...] [--python NAME=PATH ...] [--rounds 9] [--out FILE.jsonl]
"""

from __future__ import annotations

import argparse
import itertools
import socket
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from layer import OWN, WorkerProcess, add_arguments, describe, table, write
from safetensors.torch import save_file

from moetrain.testing.layer_bench import (
    LayerCase,
    Seconds,
    choose_experts,
    expected_results,
    interleave,
    make_inputs,
    rank_share,
    shared_rounds,
    spread,
)

SYSTEMS = (OWN, "torchtitan", "megatron", "deepspeed", "tutel")
SHAPES = ("1024,512,1024,16,2", "1024,512,256,64,8")


class RankGroup:
    """The workers of one system, one process group. records: the ranks' answers, round by round."""

    def __init__(self, name: str, python: str, ranks: int, options: argparse.Namespace, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        self.workers = []
        for rank in range(ranks):
            log = folder / f"{name}-{rank}.log"
            variables = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.workers.append(WorkerProcess(name, python, options.device, options.threads, log, options.patience, variables))
        for worker in self.workers:
            worker.greet()
        self.records: list[list[dict[str, Any]]] = []

    def ask(self, do: str, arguments: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One command to all ranks, each with its arguments; their answers."""
        for worker, own in zip(self.workers, arguments, strict=True):
            worker.send(do, **own)
        return [worker.receive() for worker in self.workers]

    def run(self) -> Seconds:
        """One step: seconds of the slowest rank, processor seconds of the mean one."""
        answers = self.ask("run", [{}] * len(self.workers))
        for answer in answers:
            if "failed" in answer:
                raise RuntimeError(answer["failed"])
        self.records.append(answers)
        return Seconds(max(answer["wall"] for answer in answers), statistics.mean(answer["cpu"] for answer in answers))

    def close(self) -> None:
        """End the processes, all at once: they leave their group together."""
        for worker in self.workers:
            worker.hang_up()
        for worker in self.workers:
            worker.close()


def fewest_bytes(case: LayerCase, ranks: int) -> int:
    """Of all ranks together. case: of all tokens."""
    chosen = choose_experts(case)
    leaving = chosen * ranks // case.experts != (torch.arange(case.tokens) * ranks // case.tokens)[:, None]
    return 4 * int(leaving.sum()) * case.hidden * case.dtype.itemsize


def prepare(case: LayerCase, ranks: int, folder: Path) -> list[dict[str, Any]]:
    """Save inputs and each rank's expected results; the arguments of its ``load``. case: of one rank's tokens."""
    inputs = make_inputs(replace(case, tokens=case.tokens * ranks))
    save_file(inputs, folder / "inputs.safetensors")
    tokens = {name: inputs[name].chunk(ranks) for name in ("x", "dy")}
    by_rank = [expected_results({**inputs, **{name: part[rank] for name, part in tokens.items()}}, case.top_k) for rank in range(ranks)]
    arguments = []
    for rank, own in enumerate(by_rank):
        # every rank's tokens contribute to an expert's gradient; the router's is the rank's own
        experts = {name: sum(one[name] for one in by_rank) for name in ("gate", "up", "down")}
        expected = {**own, **rank_share(experts, rank, ranks)}
        file = folder / f"expected-{rank}.safetensors"
        save_file({name: t.float().contiguous() for name, t in expected.items()}, file)
        arguments.append({"case": asdict(case), "inputs": str(folder / "inputs.safetensors"), "expected": str(file)})
    return arguments


def measure(
    case: LayerCase, groups: Mapping[str, RankGroup], ranks: int, options: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """Rows of one case, one for each system. case: of one rank's tokens."""
    arguments = [{**own, "warmup": options.warmup} for own in prepare(case, ranks, folder)]
    fewest = fewest_bytes(replace(case, tokens=case.tokens * ranks), ranks)
    rows, timed = [], {}
    for name, group in groups.items():
        loaded = group.ask("load", arguments)
        failed = next((answer["failed"] for answer in loaded if "failed" in answer), None)
        worst = max(loaded, key=lambda answer: answer.get("error", 0.0))
        if failed is None and worst.get("error", 0.0) > 1:
            failed = f"wrong: the error of {worst['worst']} is {worst['error']:.3g} times what is allowed"
        if name != "dense":
            row = {"system": name, "ranks": ranks, **asdict(case), **group.workers[0].about, "fewest_bytes": fewest}
            rows.append(row | ({} if failed is None else {"failed": failed}))
        if failed is None:
            timed[name] = group
    limit = timed.pop("dense")
    for group in timed.values():
        group.records.clear()
    pairs = interleave({name: group.run for name, group in timed.items()}, limit.run, options.rounds, slow=options.slow)
    for row in rows:
        if row["system"] in pairs:
            row["pairs"], row["records"] = pairs[row["system"]], list(timed[row["system"]].records)
    return rows


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table, and what is not in it."""
    header = ["T, D, F, E, K", "ranks", "precision", "routing", "system", "mean rank's CPU time / limit", "busiest rank's / limit",
              "mean rank's / moetrain's", "wall time / moetrain's", "tokens/s", "bytes / fewest", "counted / fewest"]  # fmt: skip

    def case_of(row: Mapping[str, Any]) -> tuple[str, ...]:
        shape = ", ".join(str(row[name]) for name in ("tokens", "hidden", "width", "experts", "top_k"))
        return shape, str(row["ranks"]), row["precision"], row["routing"]

    own = {case_of(row): row.get("pairs") for row in rows if row["system"] == OWN}

    def cells(row: Mapping[str, Any]) -> list[str]:
        pairs, records, ours = row["pairs"], row["records"], own.get(case_of(row)) or []
        shared = list(shared_rounds(pairs, ours))
        busiest = [max(a["cpu"] for a in answers) / pair.limit.cpu for answers, pair in zip(records, pairs, strict=True)]
        tokens = row["tokens"] * row["ranks"] / statistics.median(pair.own.wall for pair in pairs)
        written = statistics.median(sum(a["written"] for a in answers) for answers in records) / row["fewest_bytes"]
        counted = [sum(a["counted"] for a in answers) / row["fewest_bytes"] for answers in records if answers[0]["counted"] is not None]
        return [
            spread([pair.cpu for pair in pairs]),
            spread(busiest),
            spread([a.own.cpu / b.own.cpu for a, b in shared]) if shared else "",
            spread([a.own.wall / b.own.wall for a, b in shared]) if shared else "",
            f"{tokens:.0f}",
            f"{written:.4f}",
            f"{statistics.median(counted):.4f}" if counted else "",
        ]

    return table(header, rows, case_of, cells)


def main() -> None:
    """Measure all cases, print and write; what is done is written before the next case begins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    add_arguments(parser, shapes=SHAPES, systems=SYSTEMS)
    options = parser.parse_args()
    pythons = dict(entry.split("=", 1) for entry in options.python)
    rows: list[dict[str, Any]] = []
    for ranks in options.ranks:
        groups: dict[str, RankGroup] = {}
        with tempfile.TemporaryDirectory() as folder:
            try:
                for name in ("dense", *options.systems):
                    python = pythons.get(name.partition(":")[0], sys.executable)
                    groups[name] = RankGroup(name, python, ranks, options, Path(folder))
                for shape, precision, routing in itertools.product(options.shapes, options.precisions, options.routings):
                    case = LayerCase(*map(int, shape.split(",")), precision=precision, routing=routing)
                    rows += measure(case, groups, ranks, options, Path(folder))
                    print(report(rows[-len(options.systems) :]), flush=True)
                    text = f"T is each rank's. {describe(options)}\n\n{report(rows)}\n"
                    if options.out is not None:
                        write(options.out, rows, text)
            finally:
                for group in groups.values():
                    group.close()
    print(f"\n{text}")


if __name__ == "__main__":
    main()
