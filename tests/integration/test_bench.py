"""``moetrain bench`` as its users type it."""

import json
import subprocess
import sys

import pytest
from runs import TINY as TINY_RUN
from runs import environment, moetrain, write_text

from moetrain.cli import main
from moetrain.parallel.profile import COLLECTIVES, load_profile

TINY = ["device=cpu", "max_bytes=16384", "num_sizes=3", "repeats=2", "hidden_size=16", "expert_width=16", "max_rows=16"]


def test_profile_of_two_ranks(tmp_path):
    done = moetrain("bench", "profile", "launch.nproc_per_node=2", *TINY, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("alpha ms", "ns/byte", "ps/FLOP", "R^2", *COLLECTIVES):
        assert word in done.stdout
    (file,) = (tmp_path / "cache" / "profiles").glob("*.json")
    assert done.stdout.splitlines()[-1] == str(file)
    profile = load_profile(file)
    assert profile.machine.world_size == 2 and profile.cluster((0, 0)).flops > 0


def test_profile_under_torchrun_is_written_once(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "moetrain", "bench", "profile", *TINY]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("alpha ms") == 1 and len(list((tmp_path / "cache" / "profiles").iterdir())) == 1


def test_profile_of_one_process_has_only_experts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOETRAIN_CACHE", str(tmp_path))
    assert main(["bench", "profile", *TINY]) == 0
    printed = capsys.readouterr().out
    assert "ps/FLOP" in printed and "all_to_all" not in printed


@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_layer_against_its_products(precision, capsys):
    sizes = ["tokens=64", "hidden=32", "width=16", "experts=4", "top_k=2", "rounds=2", "device=cpu"]
    assert main(["bench", "layer", *sizes, "routing=zipf:1.2", f"precision={precision}"]) == 0
    printed = capsys.readouterr().out
    for line in ("layer, forward and backward", "its matrix products", "layer / products, CPU time", "peak memory of a step"):
        assert line in printed
    assert f"of what {precision} is allowed" in printed


def test_ops_against_their_slow_twins(tmp_path, capsys):
    sizes = ["tokens=24", "hidden=16", "width=8", "experts=4", "top_k=2", "vocab_size=30", "rounds=2", "device=cpu"]
    assert main(["bench", "ops", *sizes, f"out={tmp_path / 'ops.jsonl'}"]) == 0
    printed = capsys.readouterr().out
    written = [json.loads(line) for line in (tmp_path / "ops.jsonl").read_text().splitlines()]
    assert len(written) == 9
    for line in written:
        assert line["name"] in printed and line["tokens"] == 24 and line["device"] == "cpu"
        assert len(line["fast"]) == len(line["slow"]) == 2 and min(p["forward"] for p in line["fast"] + line["slow"]) > 0


def test_steps_of_the_configured_model_leave_nothing_behind(tmp_path):
    write_text(tmp_path)
    done = moetrain("bench", "step", "steps=2", "warm_up=1", *TINY_RUN, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("64 tokens, cpu", "tokens/s", "model GFLOP/s", "forward", "backward", "optimizer", "peak memory", "of 2 steps after 1"):
        assert word in done.stdout
    assert "evaluation" not in done.stdout
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "text.txt"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "must be one of: profile, layer, ops, step"),
        (["speed"], "must be one of: profile, layer, ops, step"),
        (["profile", "repeats=0"], "repeats = 0: must be >= 1"),
        (["profile", "min_bytes=4096", "max_bytes=1024"], "min_bytes = 4096: must be < max_bytes (1024)"),
        (["profile", "launch.nproc=2"], "launch.nproc = 2: unknown key"),
        (["profile", "launch=3", "launch.nproc_per_node=2"], "launch = 3: must be a mapping"),
        (["profile", "launch.nproc_per_node=3", "ranks_per_node=2"], "ranks_per_node = 2: must divide"),
        (["profile", "launch.nnodes=2"], "torchrun --nnodes 2"),
        (["layer", "routing=uniform"], "routing 'uniform' is neither balanced nor zipf:A"),
        (["layer", "experts=4"], "8 choices of 4 experts"),
        (["layer", "precision=float16"], "precision = 'float16': must be one of"),
        (["ops", "top_k=9", "experts=4"], "top_k = 9: must be <= experts (4)"),
        (["ops", "hidden=5"], "hidden = 5: must be even"),
        (["ops", "out=no/folder/ops.jsonl"], "out = 'no/folder/ops.jsonl': cannot be written: No such file"),
        (["ops", "rounds=0"], "rounds = 0: must be >= 1"),
        (["step", "steps=0"], "steps = 0: must be >= 1"),
        (["step", "train.global_batch_size=0"], "train.global_batch_size = 0: must be >= 1"),
        (["step", "launch.nproc_per_node=2"], "launch.nproc_per_node = 2: must be 1"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(arguments, expected, capsys):
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert expected in printed.err and printed.out == ""
