"""``moetrain plan`` as its users type it."""

import json

import pytest
from runs import TINY, moetrain

from moetrain.cli import main

OVERRIDES = [a for a in TINY if a.startswith(("model.", "train.", "data.seq_len", "data.tokenizer"))]
SMALL = [*OVERRIDES, "nodes=2", "ranks_per_node=2", "steps=8"]
FIGURES = {
    "name", "copies_mean", "copies_max", "load_mean", "load_worst", "tokens", "gather", "reduce", "seconds", "all_to_all_seconds",
    "compute_seconds", "exposed_seconds", "experts_moved", "prediction_error", "memory", "speedup", "fits",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Whatever starts the tests; what Hydra sets in the environment ends with the test."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")


def plan(*arguments, file):
    assert main(["plan", *arguments, f"json={file}"]) == 0
    report = json.loads(file.read_text())
    return report, {figures["name"]: figures for figures in report["strategies"]}


def test_a_configuration_on_a_described_cluster(tmp_path, capsys):
    report, strategies = plan(*SMALL, "trace=zipf:1.2", "memory=1e9", "tokens_per_rank=64", file=tmp_path / "plan.json")
    assert report["cluster"]["node_of"] == [0, 0, 1, 1] and report["tokens_per_rank"] == 64
    assert (report["steps"], report["warm_up"]) == (3, 5)
    assert all(figures.keys() == FIGURES and figures["fits"] for figures in strategies.values())
    assert strategies["EP"]["speedup"] == 1 and strategies["ZeRO-3 experts"]["tokens"] == {"intra": 0, "inter": 0}
    out = capsys.readouterr().out
    assert "Modelled, not measured" in out and all(name in out for name in strategies)


def test_memory_and_copies_follow_the_settings(tmp_path):
    _, small = plan(*SMALL, "memory=1000", "extra_slots=1", file=tmp_path / "small.json")
    assert not any(figures["fits"] for figures in small.values())
    _, more = plan(*SMALL, "parallel=fssdp", "parallel.fssdp.extra_slots=3", "mixer_seconds=1", file=tmp_path / "more.json")
    assert small["two-level"]["copies_max"] <= 1 < more["two-level"]["copies_max"] <= 3
    assert more["two-level"]["exposed_seconds"] == 0 < small["ZeRO-3 experts"]["exposed_seconds"]


def test_a_run_with_its_own_trace(workspace, capsys):
    trained = moetrain(
        "train", *TINY, "run.dir=traced", "launch.nproc_per_node=2", "parallel=ep", "metrics.trace_routing=true", folder=workspace
    )
    assert trained.returncode == 0, trained.stderr
    run = workspace / "traced"
    report, strategies = plan(f"run={run}", "nodes=2", "ranks_per_node=1", file=workspace / "plan.json")
    assert report["trace"] == str(run / "traces" / "loads.jsonl") and report["steps"] == 3
    assert report["tokens_per_rank"] == 2 * 16  # of 4 sequences of 16 tokens
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [line["experts"]["layers.1.ffn"]["rank_max_over_mean"] for line in lines[5:]]
    assert strategies["EP"]["load_mean"] == pytest.approx(sum(measured) / 3)
    assert strategies["EP"]["load_worst"] == pytest.approx(max(measured))
    # owned experts, their gradients and two moments in float64
    assert strategies["EP"]["memory"]["owned_experts"] == 2 * 3 * 16 * 8 * 4 * 8

    more, _ = plan(f"run={run}", "ranks_per_node=8", "tokens_per_rank=1000", file=workspace / "plan.json")
    assert more["tokens_per_rank"] == 1000 and len(more["cluster"]["node_of"]) == 8
    assert main(["plan", f"run={run}", "model.top_k=1"]) == 2
    assert "leave out model.top_k=1" in capsys.readouterr().err
    # a trace of 4 experts is not one of the default model's 32
    assert main(["plan", "cluster=h100", f"trace={run / 'traces' / 'loads.jsonl'}"]) == 2
    assert "has 4 experts, the model 32" in capsys.readouterr().err


def test_without_a_trace_or_a_run(workspace, capsys):
    assert main(["plan", f"run={workspace / 'reference'}", "ranks_per_node=2"]) == 2
    error = capsys.readouterr().err
    assert "trace = " in error and "metrics.trace_routing=true" in error
    assert main(["plan", f"run={workspace / 'nowhere'}", "ranks_per_node=2"]) == 2
    assert "nowhere is not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nodess=2"], "nodess = 2: unknown key, did you mean nodes"),
        (["nodes=0"], "nodes = 0: must be >= 1"),
        (["cluster=moon"], "cluster = 'moon': must be one of: here, h100"),
        (["nodes"], "arguments are key=value"),
        (["cluster=h100", "trace=zipf:x"], "trace = 'zipf:x'"),
        (["cluster=h100", "trace=missing.jsonl"], "trace = 'missing.jsonl': no such file"),
        (["cluster=h100", "steps=4"], "steps = 4: must be more than 5 steps"),
        (["cluster=h100", "steps=1"], "steps = 1: must be >= 2"),
        (["train.device=cpu", "launch.nproc_per_node=1"], "ranks_per_node = 1: one rank has nothing to choose"),
        (["cluster=h100", "model=dense_tiny"], "model = 'deepseek_moe': has no MoE layers"),
        (["cluster=h100", "parallel.tensor=2"], "parallel.tensor = 2: is not simulated"),
        (["cluster=h100", "model=nope"], "model = 'nope': unknown option; valid options: deepseek_moe"),
        (["cluster=h100", "train.steps=abc"], "train.steps = 'abc': must be an integer"),
    ],
)
def test_bad_input_is_one_message(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *arguments]) == 2
    printed = capsys.readouterr()
    assert expected in printed.err and printed.err.startswith("moetrain: error:") and "Traceback" not in printed.err
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "extra_slots=" in out and "reshard_every=10" in out
