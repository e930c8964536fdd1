"""scripts/bench/layer.py: workers, what becomes of those that fail, the table."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.testing.layer_bench import LayerCase, Seconds

SCRIPT = Path(__file__).parents[3] / "scripts" / "bench" / "layer.py"
CASE = LayerCase(tokens=64, hidden=32, width=16, experts=4, top_k=2)


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_layer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeWorker:
    about = {"version": "1.2"}

    def __init__(self, seconds, **loaded):
        self.seconds, self.loaded, self.runs = seconds, loaded, 0

    def ask(self, do, **arguments):
        return dict(self.loaded)

    def run(self):
        self.runs += 1
        return Seconds(self.seconds, self.seconds)


def options(**changed):
    return argparse.Namespace(**{"rounds": 4, "warmup": 1, "slow": 3.0, "patience": 60.0, "device": "cpu", "threads": 1, **changed})


def test_the_layers_that_compute_the_same_are_timed_and_the_others_named(tmp_path):
    out = tmp_path / "layer.jsonl"
    command = [sys.executable, str(SCRIPT), "--shapes", "64,32,16,4,2", "--precisions", "mixed", "--routings", "zipf:1.2"]
    command += ["--systems", "moetrain", "loop", "grouped_mm", "scattermoe", "--rounds", "2", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    rows = {row["system"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["moetrain", "loop", "grouped_mm", "scattermoe"]
    assert rows["scattermoe"]["failed"].startswith("not installed") or "CUDA" in rows["scattermoe"]["failed"]
    for name in ("moetrain", "loop", "grouped_mm"):
        assert len(rows[name]["pairs"]) == 2 and rows[name]["error"] <= 1 and rows[name]["peak_bytes"] > 0
        assert rows[name]["threads"] == 1
    table = out.with_suffix(".md").read_text()
    assert table.count("| 64, 32, 16, 4, 2 |") == 3 and "- scattermoe: " in table


def test_a_layer_with_wrong_results_is_reported_and_not_timed(bench, tmp_path):
    workers = {
        "dense": FakeWorker(1.0),
        "copy": FakeWorker(0.1),
        "moetrain": FakeWorker(1.5, error=0.5, worst="y", peak_bytes=1),
        "other": FakeWorker(1.0, error=3.0, worst="gate", peak_bytes=1),
    }
    own, other = bench.measure(CASE, workers, options(), tmp_path)
    assert workers["other"].runs == 0 and "pairs" not in other
    assert other["failed"] == "wrong: the error of gate is 3 times what is allowed"
    assert [pair.wall for pair in own["pairs"]] == [1.5] * 4
    table = bench.report([own, other])
    assert "| 1.50 (1.50-1.50) | 1.50 (1.50-1.50) | 1.00 (1.00-1.00) | 0 | 1000 | 0.10 |" in table
    assert table.endswith("- other: wrong: the error of gate is 3 times what is allowed")


def test_a_worker_that_dies_is_of_no_more_use_but_breaks_nothing(bench, tmp_path):
    worker = bench.WorkerProcess("no_such_adapter", sys.executable, "cpu", 1, tmp_path / "log", 60.0).greet()
    assert worker.failed == "exited with status 1"
    assert worker.ask("run") == {"failed": "exited with status 1"}
    worker.close()
    assert "no_such_adapter" in (tmp_path / "log").read_text()


def test_a_worker_that_does_not_answer_is_ended(bench, tmp_path):
    worker = bench.WorkerProcess("loop", sys.executable, "cpu", 1, tmp_path / "log", 0.01).greet()
    assert worker.failed == "no answer within 0 s"
    assert worker.process.poll() is not None
    worker.close()
