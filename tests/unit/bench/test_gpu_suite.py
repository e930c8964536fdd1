"""scripts/gpu_suite.sh: all parts at toy size on CPU without packages that a GPU machine may lack; parts that fail, hang or die."""

import argparse
import gzip
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"hydra", "omegaconf", "antlr4", "datasets", "wandb", "yaml", "tokenizers", "rich", "safetensors"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""
PARTS = """
import json, os, sys, time
part, _, record = sys.argv[1:4]
open(record, "w").write(json.dumps({"status": "passed", "headline": {"found": 1}}))
if part == "layer":
    time.sleep(60)
if part == "training":
    os.abort()
"""
CHECKS = """
import os
def fine(): pass
def wrong(): assert 1 == 2, "one is not two"
def death(): os._exit(3)
def context(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def checks():
    return {"fine": fine, "wrong": wrong, "death": death, "context": context, "last": fine}
"""


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "bench"))

    def import_file(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / "bench" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return import_file


def test_all_parts_at_toy_size(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    out = tmp_path / "out"
    settings = {
        "OUT": str(out),
        "MOETRAIN_GPU_SUITE": "tiny",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(["bash", str(ROOT / "scripts" / "gpu_suite.sh")], env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (out / "log.txt").read_text()
    found = json.loads((out / "results.json").read_text())["parts"]
    skipped = {"synchronisation", "tests"} | (set() if importlib.util.find_spec("triton") else {"kernels", "ops"})
    parts = ["kernels", "correctness", "layer", "training", "ops", "synchronisation", "profile", "tests"]
    assert {name: part["status"] for name, part in found.items()} == {name: "skipped" if name in skipped else "passed" for name in parts}
    assert [part["part"] for part in json.loads((out / "summary.json").read_text())["parts"]] == parts
    assert "kernels" in skipped or found["kernels"]["headline"]["passed"] >= 5
    assert {row["system"] for row in found["layer"]["table"] if row["both ms"]} >= {"moetrain", "grouped_mm", "loop"}
    assert "ops" in skipped or len(found["ops"]["table"]) == 10
    assert found["synchronisation"]["headline"] == {"waits in forward and backward": 0, "waits in a step": 0}
    assert len(found["profile"]["table"]) == 25
    assert json.loads(gzip.decompress((out / "trace.json.gz").read_bytes()))["traceEvents"]
    assert (out / "summary.md").read_text().count("\n## ") == 8


def test_parts_that_hang_or_die_are_recorded(load, tmp_path, monkeypatch):
    suite = load("gpu_suite")
    (tmp_path / "gpu_parts.py").write_text(PARTS)
    monkeypatch.setattr(suite, "HERE", tmp_path)
    options = argparse.Namespace(out=tmp_path, size="tiny")
    results = {name: suite.run_part(name, options, 1.0, tmp_path / "log.txt") for name in ("ops", "layer", "training")}
    assert results["ops"]["status"] == "passed"
    assert (results["layer"]["status"], results["layer"]["reason"]) == ("failed", "stopped after 1 s")
    assert (results["training"]["status"], results["training"]["reason"]) == ("failed", "exited with status -6")
    assert all(found["headline"] == {"found": 1} for found in results.values()), "what was found before is lost"
    summary, text = suite.summarise({"device": "none"}, results)
    assert [part["why"] for part in summary["parts"]] == ["", "stopped after 1 s", "exited with status -6"]
    assert "## training: failed" in text


def test_what_the_deadline_leaves_no_time_for_is_not_run(load, tmp_path, monkeypatch, capsys):
    suite = load("gpu_suite")
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--out", str(tmp_path), "--deadline", "0", "--parts", "tests", "layer"])
    monkeypatch.setattr(suite, "describe", lambda options: {"device": "none"})
    with pytest.raises(SystemExit, match="True"):
        suite.main()
    parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert [(part["part"], part["status"]) for part in parts] == [("layer", "not run"), ("tests", "not run")]


def test_a_check_that_breaks_its_process_fails_alone(load, tmp_path, monkeypatch):
    parts = load("gpu_parts")
    (tmp_path / "fake_checks.py").write_text(CHECKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    reports = []
    parts.check_all("fake_checks", 1, 1, lambda ended, left: reports.append((dict(ended), left)))
    ended, left = reports[-1]
    outcomes = {name: why and why.strip().splitlines()[-1] for name, (why, _) in ended.items()}
    assert left == 0 and outcomes == {
        "fine": None,
        "wrong": "AssertionError: one is not two",
        "death": "its process ended with status 3",
        "context": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "last": None,
    }


def test_places_that_wait_are_named(load):
    parts = load("gpu_parts")
    with parts.waits() as found:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert found == {"no frame of moetrain": 1}
