"""Progress for people: a live display on a terminal, one line per step elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 48) -> str:
    """Values as a row of bars, low to high, averaged down to ``width`` columns."""
    values = [value for value in values if math.isfinite(value)]  # a skipped step's loss may not be
    if not values:
        return ""
    size = max(1, -(-len(values) // width))
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    return "".join(BARS[round((v - low) / (high - low or 1.0) * (len(BARS) - 1))] for v in means)


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plain_line(line: Mapping[str, Any], total: int, eta: float) -> str:
    """One step in one line."""
    worst = max((layer["max_over_mean"] for layer in line["experts"].values()), default=1.0)
    parts = [
        f"step {line['step']}/{total}",
        f"loss {line['loss']:.4f}",
        f"grad_norm {line['grad_norm']:.3f}",
        f"lr {line['lr']:.2e}",
        f"tokens/s {line['tokens_per_second']:.0f}",
        f"max/mean load {worst:.2f}",
        f"eta {duration(eta)}",
    ]
    if "eval_loss" in line:
        parts.insert(2, f"eval_loss {line['eval_loss']:.4f}")
    if line["skipped"]:
        parts.append("SKIPPED: not finite")
    return "  ".join(parts)


class Display:
    """Shows nothing; the base of the displays that do."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.recent: deque[float] = deque(maxlen=20)

    @staticmethod
    def open(kind: Literal["auto", "rich", "plain", "none"], *, total: int) -> Display:
        """auto: rich if standard output is a terminal, else plain lines."""
        if kind == "auto":
            kind = "rich" if sys.stdout.isatty() else "plain"
        return {"rich": RichDisplay, "plain": PlainDisplay, "none": Display}[kind](total)

    def eta(self, line: Mapping[str, Any]) -> float:
        """Seconds left, from the last steps."""
        self.recent.append(line["step_seconds"])
        return sum(self.recent) / len(self.recent) * (self.total - line["step"])

    def say(self, text: str) -> None:
        """A remark between steps."""

    def step(self, line: Mapping[str, Any]) -> None:
        """A step is done; ``line`` is what metrics.jsonl gets."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class PlainDisplay(Display):
    """One line per step on standard output."""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def step(self, line: Mapping[str, Any]) -> None:
        print(plain_line(line, self.total, self.eta(line)), flush=True)


class RichDisplay(Display):
    """A panel that is redrawn in place: loss curve, speed, time left, balance of each MoE layer."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        from rich.live import Live

        self.losses: list[float] = []
        self.started = time.monotonic()
        self.live = Live(refresh_per_second=4)
        self.live.start()

    def say(self, text: str) -> None:
        self.live.console.print(text, highlight=False)

    def step(self, line: Mapping[str, Any]) -> None:
        self.losses.append(line["loss"])
        self.live.update(self.panel(line))

    def panel(self, line: Mapping[str, Any]) -> Any:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 2))
        head.add_row(f"[bold]step {line['step']}/{self.total}[/]", ProgressBar(total=self.total, completed=line["step"], width=40),
                     f"eta {duration(self.eta(line))}", f"elapsed {duration(time.monotonic() - self.started)}")  # fmt: skip
        facts = Table.grid(padding=(0, 3))
        facts.add_row(f"loss [bold]{line['loss']:.4f}[/]", f"grad norm {line['grad_norm']:.3f}", f"lr {line['lr']:.2e}",
                      f"{line['tokens_per_second']:,.0f} tokens/s", f"{line['model_flops_per_second'] / 1e9:,.1f} GFLOP/s")  # fmt: skip
        experts = Table(box=None, padding=(0, 2), header_style="dim")
        for column in ("MoE layer", "load of each expert", "max/mean", "idle", "dropped", "entropy"):
            experts.add_column(column)
        for name, layer in line["experts"].items():
            experts.add_row(name, sparkline([0.0, *layer["load"]], 65)[1:], f"{layer['max_over_mean']:.2f}", str(layer["idle"]),
                            f"{layer['dropped']:.1%}", f"{layer['entropy']:.2f}")  # fmt: skip
        body = Group(head, facts, Text(f"loss  {sparkline(self.losses)}"), experts)
        return Panel(body, title="moetrain", border_style="cyan")

    def close(self) -> None:
        self.live.stop()
