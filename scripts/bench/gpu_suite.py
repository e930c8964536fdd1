"""Everything that only a GPU can show: runs the parts of gpu_parts.py one after the other, within a deadline.

Each part is a process of its own with a budget: one that fails, hangs or breaks the GPU's context is recorded and the others go
on. results.json, summary.json and summary.md are rewritten as each part ends; log.txt has what the parts print.

usage: python scripts/bench/gpu_suite.py --out FOLDER [--parts kernels layer ...] [--size full|tiny] [--deadline 520]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BUDGETS = {"kernels": 170, "correctness": 45, "layer": 130, "training": 75, "ops": 60, "synchronisation": 40, "profile": 60, "tests": 120}
"""Seconds of each part, the most important first: what the deadline leaves no time for is at the end."""
ENOUGH = 8.0
"""A part is not begun with fewer seconds than this."""
HERE = Path(__file__).parent


def run_part(name: str, options: argparse.Namespace, seconds: float, log: Path) -> dict[str, Any]:
    """What the part recorded, with its status and its duration. Its processes are gone afterwards."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("a") as output:
        record = Path(folder) / "record.json"
        command = [sys.executable, str(HERE / "gpu_parts.py"), name, "--record", str(record), "--out", str(options.out)]
        output.write(f"\n== {name}\n")
        output.flush()
        process = subprocess.Popen([*command, "--size", options.size], stdout=output, stderr=output, start_new_session=True)
        try:
            status = {0: None}.get(process.wait(seconds), f"exited with status {process.returncode}")
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        found: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    if status is not None:
        found |= {"status": "failed", "reason": found.get("reason") or status}
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def cell(value: Any) -> str:
    """Of a table."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value).replace("|", "/")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of rows; columns are those of the first."""
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(row.get(name)) for name in rows[0]] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def summarise(about: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    """summary.json and summary.md. Of a part's record, ``headline`` are its main figures and ``table`` rows for people."""
    parts = [
        {"part": name, "status": found["status"], "seconds": found["seconds"], "why": (found.get("reason") or "").split("\n")[-1][:200]}
        for name, found in results.items()
    ]
    headlines = {name: found["headline"] for name, found in results.items() if found.get("headline")}
    summary = {**about, "parts": parts, "headlines": headlines}
    text = [f"# GPU suite: {about['device']}\n", ", ".join(f"{name} {value}" for name, value in about.items()) + "\n", table(parts)]
    for name, found in results.items():
        text.append(f"## {name}: {found['status']}\n")
        text += [f"{found['about']}\n"] if found.get("about") else []
        text += [f"- {key}: {cell(value)}" for key, value in found.get("headline", {}).items()] + [""]
        text.append(table(found.get("table", [])))
        text += [f"```\n{found['traceback'][-2000:]}```\n"] if found.get("traceback") else []
    return summary, "\n".join(text)


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Machine and versions, asked for in another process: this one must outlive a GPU that does not answer."""
    script = "import json, torch; print(json.dumps([torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name()]))"
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=90, check=True)
        version, device = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, json.JSONDecodeError) as error:
        version, device = None, f"unknown: {error}"
    return {"device": device or platform.machine(), "torch": version, "python": platform.python_version(), "size": options.size}


def main() -> None:
    """Run the parts; exit status 1 if one failed or was not run."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: toy sizes, also on CPU")
    parser.add_argument("--parts", nargs="+", choices=BUDGETS, default=list(BUDGETS), metavar="PART", help=", ".join(BUDGETS))
    parser.add_argument("--deadline", type=float, default=520.0, help="seconds for all parts")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "log.txt"
    log.write_text("")
    about = describe(options)
    results: dict[str, dict[str, Any]] = {}
    for name in (name for name in BUDGETS if name in options.parts):
        seconds = min(BUDGETS[name], start + options.deadline - time.monotonic())
        if seconds < ENOUGH:
            results[name] = {"status": "not run", "seconds": 0.0, "reason": f"the deadline of {options.deadline:.0f} s"}
        else:
            results[name] = run_part(name, options, seconds, log)
        summary, text = summarise(about, results)
        (options.out / "results.json").write_text(json.dumps({**about, "parts": results}, indent=1))
        (options.out / "summary.json").write_text(json.dumps(summary, indent=1))
        (options.out / "summary.md").write_text(text)
        print(name, json.dumps({key: results[name].get(key) for key in ("status", "seconds", "reason", "headline")}), flush=True)
    print(text)
    raise SystemExit(any(found["status"] in ("failed", "not run") for found in results.values()))


if __name__ == "__main__":
    main()
