"""Every layout in every scenario against one process, in float64: the table that proves that layouts change nothing.

usage: python scripts/check_layouts.py [--layouts PATTERN ...] [--scenarios PATTERN ...] [--ranks N ...]
           [--results FILE] [--minutes M] [--output FILE]
Prints a Markdown table with the largest relative error of losses, outputs, gradients, norms and weights per cell; exits with
1 if a cell fails. Patterns are shell patterns on the names in moetrain/testing/table.py. --results keeps what has been
computed, so that the same command goes on where it stopped; --minutes stops early, and the table says what is missing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from moetrain.testing.distributed import RankError
from moetrain.testing.scenarios import SCENARIOS
from moetrain.testing.table import LAYOUTS, RANKS, STEPS, Cell, cells
from moetrain.testing.tolerances import TOLERANCES

LIMIT = TOLERANCES["layout"][torch.float64]


@dataclass(frozen=True)
class Result:
    """error: the largest relative one, None if there is nothing to compare. message: why."""

    cell: Cell
    error: float | None
    message: str = ""

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= LIMIT


def main(arguments: Sequence[str]) -> int:
    """Run what is asked for and has not been run yet; print the table. Returns the exit status."""
    parser = argparse.ArgumentParser(description="layouts against one process")
    parser.add_argument("--layouts", nargs="+", default=["*"])
    parser.add_argument("--scenarios", nargs="+", default=["*"])
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    asked = [
        cell
        for cell in sorted(cells(), key=lambda cell: cell.ranks)
        if cell.ranks in options.ranks and matches(cell.layout, options.layouts) and matches(cell.scenario, options.scenarios)
    ]
    results = {result.cell: result for result in read(options.results) if result.cell in asked and result.passed}
    stop = time.monotonic() + 60 * options.minutes
    for number, cell in enumerate(asked, start=1):
        if cell in results or time.monotonic() > stop:
            continue
        results[cell] = result = run(cell)
        print(f"{number}/{len(asked)} {cell}: {result.message or f'{result.error:.1e}'}", file=sys.stderr, flush=True)
        if options.results is not None:
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(result)) + "\n")
    text = markdown(asked, results, shlex.join(["python", "scripts/check_layouts.py", *without_output(arguments)]))
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    return int(not results or not all(result.passed for result in results.values()))


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits one of the shell patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def run(cell: Cell) -> Result:
    """The cell's error; a failure is a result as well."""
    try:
        return Result(cell, cell.error())
    except (AssertionError, RankError) as error:
        return Result(cell, None, str(error).strip() or type(error).__name__)


def read(file: Path | None) -> list[Result]:
    """What earlier calls have written."""
    if file is None or not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [Result(Cell(**line["cell"]), line["error"], line["message"]) for line in lines]


def without_output(arguments: Sequence[str]) -> list[str]:
    """The arguments that decide what is computed."""
    kept, skip = [], False
    for argument in arguments:
        skip, skipped = argument in ("--output", "--results", "--minutes"), skip
        if not (skip or skipped):
            kept.append(argument)
    return kept


def markdown(asked: Sequence[Cell], results: dict[Cell, Result], command: str) -> str:
    """The results as a document: one table per number of ranks."""
    lines = [
        "# Layouts against one process",
        "",
        f"`{command}`, torch {torch.__version__}, gloo on CPU, float64, {STEPS} optimizer steps.",
        "",
        "A cell is the largest relative error of losses, gradient norms, outputs, gradients and weights against one process without",
        f"micro-batches and recomputation; the limit is {LIMIT:g}. Loads of experts are compared as integers.",
        "`-`: the layout refuses this number of ranks or experts. `?`: not run. Names are those of `moetrain/testing/table.py`.",
        "",
        summary(asked, results),
    ]
    scenarios = [name for name in SCENARIOS if any(cell.scenario == name for cell in asked)]
    for ranks in sorted({cell.ranks for cell in asked}):
        lines += ["", f"## {ranks} rank{'s' if ranks > 1 else ''}", ""]
        lines += [f"| layout | {' | '.join(scenarios)} |", "|---" * (len(scenarios) + 1) + "|"]
        here = {cell for cell in asked if cell.ranks == ranks}
        for layout in LAYOUTS:
            row = [Cell(layout, name, ranks) for name in scenarios]
            if any(cell in here for cell in row):
                lines.append(f"| {layout} | {' | '.join(shown(results.get(cell)) if cell in here else '-' for cell in row)} |")
    return "\n".join(lines)


def summary(asked: Sequence[Cell], results: dict[Cell, Result]) -> str:
    """How much has been run, and the worst of it."""
    failed = [result for result in results.values() if not result.passed]
    errors = [result.error for result in results.values() if result.error is not None]
    worst = f"largest error {max(errors):.1e}" if errors else "no results"
    return f"{len(results)} of {len(asked)} cells run, {len(failed)} failed, {worst}."


def shown(result: Result | None) -> str:
    """A result as the text of its cell."""
    if result is None:
        return "?"
    error = "no result" if result.error is None else f"{result.error:.0e}"
    return error if result.passed else f"**FAILED: {error}**"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
