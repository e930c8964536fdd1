"""The result of ``moetrain plan`` as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from moetrain.config import dump
from moetrain.parallel.placement.plan import Cluster
from moetrain.simulate.replay import Figures, Replay
from moetrain.storage import replace, storage_errors


@dataclass(frozen=True)
class Table:
    """Texts by row; the first column names the row."""

    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class PlanReport:
    """model: its kind. trace: its name; steps: those that are counted, after ``warm_up`` others.
    memory: bytes of a rank, None if not known. replays: of all strategies, expert parallelism first."""

    model: str
    parameters: int
    expert_parameters: int
    trace: str
    steps: int
    warm_up: int
    tokens_per_rank: int
    reshard_every: int
    cluster: Cluster
    memory: float | None
    replays: list[Replay]

    @property
    def strategies(self) -> list[Figures]:
        """Figures of all strategies."""
        return [each.figures for each in self.replays]

    def speedup(self, figures: Figures) -> float:
        """Modelled time of the MoE layers under expert parallelism over that under this strategy."""
        return self.strategies[0].seconds / figures.seconds

    def fits(self, figures: Figures) -> bool | None:
        """Whether the fullest rank's memory suffices without activations; None if it is not known."""
        return None if self.memory is None else figures.memory.total <= self.memory

    def tables(self) -> list[Table]:
        """Balance and traffic; times and memory. One row for each strategy."""
        most = max(b for f in self.strategies for t in (f.tokens, f.gather, f.reduce) for b in (t.intra, t.inter))
        unit, size = ("GB", 1e9) if most >= 1e10 else ("MB", 1e6)
        traffic = [f"{what} {unit} {tier}" for what in ("tokens", "experts") for tier in ("intra", "inter")]
        balance = Table(["placement", "copies mean", "copies max", "load max/mean", "load worst", *traffic])
        times = ["all-to-all ms", "compute ms", "exposed ms", "total ms", "EP / total"]
        costs = Table(["placement", *times, "owned GB", "copies GB", "dense GB", "total GB", "fits"])
        for f in self.strategies:
            moved = (f.tokens.intra, f.tokens.inter, f.gather.intra + f.reduce.intra, f.gather.inter + f.reduce.inter)
            loads = (f"{f.copies_mean:.2f}", str(f.copies_max), f"{f.load_mean:.3f}", f"{f.load_worst:.3f}")
            balance.rows.append([f.name, *loads, *(f"{part / size:.1f}" for part in moved)])
            seconds = (f.all_to_all_seconds, f.compute_seconds, f.exposed_seconds, f.seconds)
            memory = (f.memory.owned_experts, f.memory.copies, f.memory.dense, f.memory.total)
            fits = {None: "?", True: "yes", False: "no"}[self.fits(f)]
            speedup = f"{self.speedup(f):.2f}"
            costs.rows.append([f.name, *(f"{1e3 * t:.3f}" for t in seconds), speedup, *(f"{m / 1e9:.3f}" for m in memory), fits])
        return [balance, costs]

    def plain(self) -> dict[str, Any]:
        """All figures as JSON values."""
        figures = [{**dump(f), "speedup": self.speedup(f), "fits": self.fits(f)} for f in self.strategies]
        described = {f.name: dump(getattr(self, f.name)) for f in fields(self) if f.name != "replays"}
        return {**described, "strategies": figures}

    def save(self, path: Path) -> None:
        """Write all figures as JSON. Raises StorageError."""
        with storage_errors(path):
            replace(path, json.dumps(self.plain(), indent=1) + "\n")

    def show(self) -> None:
        """Print what was assumed, and the table."""
        from rich.console import Console
        from rich.table import Table as RichTable

        cluster = self.cluster
        memory = "" if self.memory is None else f", {self.memory / 1e9:.1f} GB per rank"
        print(
            f"{self.model}: {self.parameters / 1e6:.1f}M parameters, {self.expert_parameters / 1e6:.1f}M of them in experts\n"
            f"{cluster.num_nodes} x {cluster.num_ranks // cluster.num_nodes} ranks{memory}; "
            f"{cluster.intra_bandwidth:.3g} bytes/s in nodes, {cluster.inter_bandwidth:.3g} between; {cluster.latency:.3g} s latency; "
            f"{cluster.flops:.3g} FLOP/s\n"
            f"trace {self.trace}: {self.steps} steps after {self.warm_up} of history, {self.tokens_per_rank} tokens per rank, "
            f"error of prediction {self.strategies[0].prediction_error:.2f}; new owners and EPLB anew every {self.reshard_every} steps\n"
        )
        console = Console(width=None if sys.stdout.isatty() else 120)
        for table in self.tables():
            shown = RichTable(box=None, padding=(0, 1), pad_edge=False)
            for column in table.columns:
                left = column == table.columns[0]
                shown.add_column(column, justify="left" if left else "right", vertical="bottom", no_wrap=left)
            for row in table.rows:
                shown.add_row(*row)
            console.print(shown, highlight=False)
            print()
        print("Modelled, not measured. Copies and load: of a rank and layer. Bytes: of all ranks and layers, per step. Times: of all MoE")
        print("layers, forward and backward. Memory: of the fullest rank, without activations.")
