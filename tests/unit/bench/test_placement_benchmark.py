"""Traces, figures and reports of the placement benchmarks, at toy size."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parents[3] / "scripts" / "bench"


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import placement

    return placement


@pytest.mark.parametrize("kind", ["uniform", "zipf:1.2", "one"])
def test_traces_are_reproducible_with_distinct_choices(bench, kind):
    trace = bench.routing_trace(kind, 3, 500, 16, 2, seed=4)
    assert trace.shape == (3, 500, 2) and trace.dtype == torch.int64
    assert (trace[..., 0] != trace[..., 1]).all() and trace.min() >= 0 and trace.max() < 16
    assert torch.equal(trace[:2], bench.routing_trace(kind, 2, 500, 16, 2, seed=4)), "more steps only continue a trace"
    if kind != "one":
        assert not torch.equal(trace[0], trace[1])
        assert not torch.equal(trace, bench.routing_trace(kind, 3, 500, 16, 2, seed=5))


def test_skew_of_traces(bench):
    imbalance = {kind: bench.rank_imbalance(bench.routing_trace(kind, 2, 4096, 16, 2, 0), 16, 4) for kind in ("uniform", "zipf:1.2", "one")}
    assert imbalance["uniform"] < 1.05
    assert 3.2 < imbalance["zipf:1.2"] < 3.4, "choices are those of a router with noise, sharper than draws from a Zipf law"
    assert imbalance["one"] == 4


def test_committed_traces(bench):
    committed = json.loads((BENCH / "traces.json").read_text())
    assert ["zipf:1.2", 4096, 16, 2, 0] in [entry["arguments"] for entry in committed]
    for entry in committed:
        kind, *arguments = entry["arguments"]
        assert bench.digest(bench.routing_trace(kind, 1, *arguments)) == entry["sha256"], entry["arguments"]


def test_traces_of_recorded_loads_have_these_loads(bench, tmp_path):
    loads = np.array([[5, 0, 20, 7], [3, 4, 0, 1]])  # of two ranks
    lines = [{"step": 0, "loads": {"a": [[1, 1, 1, 1]], "b": [[1, 1, 1, 1]]}}]
    lines += [{"step": step, "loads": {"a": loads.tolist(), "b": loads[:, ::-1].tolist()}} for step in (1, 2)]
    path = tmp_path / "loads.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for layer, expected in (("", loads.sum(0)), (":b", loads.sum(0)[::-1])):
        trace = bench.routing_trace(f"{path}{layer}", 2, 20, 4, 2, seed=0)
        for step in trace:
            assert torch.bincount(step.reshape(-1), minlength=4).tolist() == expected.tolist()
            assert (step[:, 0] != step[:, 1]).all()
    with pytest.raises(ValueError, match="loads of 4 experts, not of 8"):
        bench.routing_trace(str(path), 2, 20, 8, 2, seed=0)
    with pytest.raises(ValueError, match="no layer 'c', but a, b"):
        bench.routing_trace(f"{path}:c", 2, 20, 4, 2, seed=0)
    with pytest.raises(ValueError, match="has 3 steps, 4 are needed"):
        bench.routing_trace(str(path), 4, 20, 4, 2, seed=0)
    with pytest.raises(ValueError, match="no 3 distinct choices per token"):
        bench.routing_trace(str(path), 2, 20, 4, 3, seed=0)
    with pytest.raises(ValueError, match="none of uniform, zipf:A, one, and no file"):
        bench.routing_trace("zpif", 2, 20, 4, 2, seed=0)


def test_balanced_products_are_those_of_an_expert(bench):
    """They do the work of the nine products: three forward, two for each weight's and input's gradient."""
    from torch.utils.flop_counter import FlopCounterMode

    case = bench.Case(tokens=32, hidden=16, width=8, experts=8, top_k=2)
    with FlopCounterMode(display=False) as counter:
        bench.balanced_products(case, ranks=4)()
    assert counter.get_total_flops() == 9 * 2 * case.tokens * case.top_k * case.hidden * case.width


def test_straggler_on_two_ranks(bench, tmp_path):
    import straggler

    from moetrain.testing.distributed import run_distributed

    case = bench.Case(tokens=96, hidden=64, width=64, experts=8, window=1, rounds=2, warmup=1, overlap_degree=2)
    result, other = run_distributed(bench.measure, 2, case)
    assert result["rounds"] == other["rounds"], "all ranks have the same records"
    assert [(r["round"], r["system"]) for r in result["rounds"]] == [(n, name) for n in range(2) for name in bench.SYSTEMS]
    for record in result["rounds"]:
        assert record["rank_max_over_mean"] >= 1
        assert all(s > 0 for key in ("seconds", "cpu_seconds", "products_cpu_seconds") for s in record[key])
        assert all(sum(waited.values()) < seconds for waited, seconds in zip(record["waited"], record["seconds"], strict=True))
        assert not any(kind.endswith(".inter") for kinds in record["bytes"] for kind in kinds), "one node"
        # every row that goes out comes back, forward and backward
        moved = [{kind.split(".")[0]: count for kind, count in kinds.items()} for kinds in record["bytes"]]
        assert sum(kinds.get("dispatch", 0) for kinds in moved) == sum(kinds.get("combine", 0) for kinds in moved)
        if record["system"] == "fssdp_paper":
            assert record["copies"] == 2 and record["rank_max_over_mean"] < result["setup"]["rank_imbalance"]
    assert bench.of_system(result, "ep", lambda record: record["copies"]) == [0, 0]
    assert result["transfer_seconds"]["ep"] == 0 < result["transfer_seconds"]["fssdp_paper"]

    ratios = bench.of_system(result, "ep", straggler.ratio)
    first = result["rounds"][0]
    assert ratios[0] == max(first["cpu_seconds"]) / statistics.mean(first["products_cpu_seconds"])
    text = straggler.report([result])
    assert text.count("| zipf:1.2 |") == len(bench.SYSTEMS)
    bench.write(tmp_path / "out.jsonl", [result], text)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines) == 1 + 2 * len(bench.SYSTEMS) + 1 and lines[0]["setup"]["hidden"] == 64
    assert (tmp_path / "out.md").read_text() == text + "\n"
