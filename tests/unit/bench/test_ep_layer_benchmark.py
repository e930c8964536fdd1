"""scripts/bench/ep_layer.py: two ranks compute the right thing, and their rows are all that travels."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moetrain.testing.layer_bench import LayerCase, choose_experts, expected_results, make_inputs, rank_share

BENCH = Path(__file__).parents[3] / "scripts" / "bench"
CASE = LayerCase(tokens=64, hidden=32, width=16, experts=4, top_k=2, routing="zipf:1.2")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import ep_layer

    return ep_layer


def test_ranks_agree_with_the_reference_and_send_only_rows(tmp_path):
    out = tmp_path / "ep.jsonl"
    command = [sys.executable, str(BENCH / "ep_layer.py"), "--ranks", "2", "--shapes", "64,32,16,4,2", "--precisions", "float32"]
    command += ["--systems", "moetrain", "loop", "--rounds", "2", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    own, loop = map(json.loads, out.read_text().splitlines()[:2])
    assert own["routing"] == "balanced" and len(own["pairs"]) == 2
    for answers in own["records"]:
        assert sum(answer["counted"] for answer in answers) == own["fewest_bytes"]
        assert sum(answer["written"] for answer in answers) >= own["fewest_bytes"]
    assert "pairs" not in loop  # it has no experts of other ranks
    assert "| 1.0000 |" in out.with_suffix(".md").read_text()


def test_fewest_bytes_counts_each_row_that_leaves_its_rank(bench):
    chosen = choose_experts(CASE)
    leaving = sum(expert // 2 != token // 32 for token, row in enumerate(chosen.tolist()) for expert in row)
    assert 0 < leaving < 128
    assert bench.fewest_bytes(CASE, 2) == 4 * leaving * 32 * 4
    assert bench.fewest_bytes(replace(CASE, precision="mixed"), 2) == 4 * leaving * 32 * 2
    assert bench.fewest_bytes(CASE, 1) == 0


def test_shares_of_the_ranks_make_up_the_whole(bench, tmp_path):
    from safetensors.torch import load_file

    arguments = bench.prepare(CASE, 2, tmp_path)
    by_rank = [load_file(own["expected"]) for own in arguments]
    whole = expected_results(make_inputs(replace(CASE, tokens=128)), CASE.top_k)
    for name in ("y", "x", "gate", "up", "down"):
        torch.testing.assert_close(torch.cat([own[name] for own in by_rank]), whole[name].float())
    torch.testing.assert_close(sum(own["router"] for own in by_rank), whole["router"].float())
    inputs = rank_share(load_file(arguments[0]["inputs"]), 1, 2)
    assert inputs["x"].shape == (64, 32) and inputs["gate"].shape == (2, 16, 32) and inputs["router"].shape == (4, 32)
