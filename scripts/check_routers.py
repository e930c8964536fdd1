"""Every router under every capacity policy and the layouts single, ep and fssdp, against one process, in float64.

usage: python scripts/check_routers.py [--routers PATTERN ...] [--ranks N] [--steps N] [--results FILE] [--output FILE]
Prints a Markdown table with the largest relative error of losses, outputs, gradients, norms and weights per cell, or why the
configuration refuses it; exits with 1 if a cell fails. Rows and columns are those of moetrain/testing/router_table.py, made
from the registry; patterns are shell patterns on the rows. --results keeps the rows that have been computed, so that the same
command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import astuple
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from moetrain.testing.distributed import RankError
from moetrain.testing.router_table import LAYOUTS, RouterCell, cells, columns, fitting_losses, outcomes, rows
from moetrain.testing.scenarios import largest_error
from moetrain.testing.tolerances import TOLERANCES

LIMIT = TOLERANCES["layout"][torch.float64]


def main(arguments: Sequence[str]) -> int:
    """Run the rows that are asked for; print the table. Returns the exit status."""
    parser = argparse.ArgumentParser(description="routers under layouts against one process")
    parser.add_argument("--routers", nargs="+", default=["*"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    asked = [row for row in rows() if any(fnmatchcase(row, pattern) for pattern in options.routers)]
    known, results = read(options.results), {}
    for number, row in enumerate(asked, start=1):
        here = cells(row, options.ranks, options.steps)
        if not known.keys() >= set(here):
            known |= run(here)
            if options.results is not None:
                with options.results.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps([*astuple(cell), known[cell]]) + "\n" for cell in here)
        results |= {cell: known[cell] for cell in here}
        print(f"{number}/{len(asked)} {row}", file=sys.stderr, flush=True)
    command = ["python", "scripts/check_routers.py", *(["--routers", *options.routers] if options.routers != ["*"] else [])]
    text = markdown(asked, results, options, shlex.join([*command, "--ranks", str(options.ranks), "--steps", str(options.steps)]))
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    return int(any(isinstance(result, float) and result > LIMIT for result in results.values()))


def read(file: Path | None) -> dict[RouterCell, float | str]:
    """What earlier calls have computed."""
    if file is None or not file.exists():
        return {}
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {RouterCell(*cell, tuple(losses)): result for *cell, losses, result in lines}


def run(row: list[RouterCell]) -> dict[RouterCell, float | str]:
    """The error of each cell of a row, infinite if it cannot be compared; or the reason for which it is refused."""
    results: dict[RouterCell, float | str] = {}
    for cell in row:
        problem = cell.problem()
        if problem is not None:
            results[cell] = problem
    accepted = [cell for cell in row if cell not in results]
    try:
        results |= {cell: largest_error(actual, expected) for cell, actual, expected in outcomes(accepted)}
    except (AssertionError, RankError) as error:
        print(error, file=sys.stderr, flush=True)
        results |= {cell: float("inf") for cell in accepted if cell not in results}
    return results


def markdown(asked: list[str], results: dict[RouterCell, float | str], options: argparse.Namespace, command: str) -> str:
    """The results as a document."""
    errors = [result for result in results.values() if isinstance(result, float)]
    failed = sum(error > LIMIT for error in errors)
    reasons = list(dict.fromkeys(result for result in results.values() if isinstance(result, str)))
    worst = f", largest error {max(errors):.1e}" if errors else ""
    lines = [
        "# Routers under layouts and capacity policies",
        "",
        f"`{command}`, torch {torch.__version__}, gloo on CPU, float64, {options.steps} optimizer steps, {options.ranks} ranks.",
        "",
        f"A cell has the largest relative errors of {', '.join(LAYOUTS)}: of losses, gradient norms, outputs, gradients and weights",
        f"against one process; the limit is {LIMIT:g}. Loads of experts are compared as integers. Rows are made from the registry:",
        "what stands behind `router=`. `losses` is how many of the registered ones the configuration accepts with the router, all",
        "on in the first column. `single` and `fssdp` recompute activations. Rules of rank scope are compared with one process that",
        "has the tokens of each rank as a micro-batch. Some sequences are padded, one is padding only.",
        "",
        f"{len(errors)} cells, {failed} failed{worst}; {len(results) - len(errors)} refused, by the number of the reason below.",
        "",
        f"| router | losses | {' | '.join(columns())} |",
        "|---" * (len(columns()) + 2) + "|",
    ]
    for row in asked:
        of_row = [cell for cell in results if cell.row == row]
        shown = []
        for column in columns():
            here = [results[cell] for cell in of_row if cell.column == column]
            refused = [f"({reasons.index(result) + 1})" for result in here if isinstance(result, str)]
            shown.append(refused[0] if refused else " ".join(cell_text(result) for result in here if isinstance(result, float)))
        losses = str(len(fitting_losses(row))) if any(isinstance(results[cell], float) for cell in of_row) else "-"
        lines.append(f"| {row} | {losses} | {' | '.join(shown)} |")
    lines += ["", "Refused:", "", *(f"{number}. `{reason}`" for number, reason in enumerate(reasons, start=1))]
    return "\n".join(lines)


def cell_text(error: float) -> str:
    """An error as the text of its cell."""
    return f"{error:.0e}" if error <= LIMIT else f"**FAILED: {error:.0e}**"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
