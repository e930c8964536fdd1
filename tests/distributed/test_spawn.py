"""Experts that are spawned from one FFN in the middle of a run: the same under any layout, and a resume repeats it."""

import json
from dataclasses import replace
from itertools import chain, repeat

import pytest
import torch
import yaml

import moetrain.components  # noqa: F401
from moetrain.config import dump, load
from moetrain.data import prepare
from moetrain.parallel.ranks import Ranks
from moetrain.registry import lookup
from moetrain.testing.distributed import run_distributed
from moetrain.testing.tolerances import assert_close
from moetrain.train import checkpoint, faults
from moetrain.train.restore import restore
from moetrain.train.run import run_training
from moetrain.train.settings import Config

STEPS, SPAWN = 6, 3
MOVING = dict(extra_slots=1, reshard_every=1)
LAYOUTS = {
    "ep": dict(kind="ep"),
    "fsdp": dict(kind="fsdp"),
    "fssdp": dict(kind="fssdp", fssdp=MOVING),
    "tensor": dict(kind="ep", tensor=2),
    "expert-tensor": dict(kind="ep", tensor=2, expert_tensor=2),
}


def make_config(folder, **sections):
    """A small EvoMoE run that checkpoints every step."""
    spawn = dict(after=SPAWN / STEPS, mask=0.3, noise=0.5)
    plain = {
        "run": {},
        "train": dict(steps=STEPS, global_batch_size=4, dtype="float64", device="cpu"),
        "model": dict(
            kind="deepseek_moe", hidden_size=16, num_layers=2, num_heads=2, head_dim=8, num_experts=4, top_k=1, expert_width=8,
            shared_width=8, dense_width=16,
        ),
        "router": dict(kind="dense_to_sparse"),
        "capacity": dict(kind="none"),
        "experts": dict(kind="ffn", num_experts=4, width=8, spawn=spawn),
        "loss": {"balance": dict(kind="gate_balance", coefficient=0.01)},
        "objective": dict(kind="language_modeling"),
        "data": dict(kind="text", path=str(folder / "text.txt"), split="paragraph", tokenizer="bytes", seq_len=16, eval_fraction=0.1),
        "optim": dict(kind="adamw", lr=1e-2),
        "schedule": dict(kind="cosine", warmup_steps=2),
        "parallel": dict(kind="single"),
        "checkpoint": dict(every_steps=1, keep=STEPS),
        "metrics": {},
        "logging": dict(display="none", sample_prompt=None),
        "launch": {},
    }  # fmt: skip
    return load(Config, plain | sections)


def train(rank, world_size, config, data, runs, stops=()):
    """Train in each of these folders under its layout. stops: steps that the first parts of a run do."""
    for run, parallel in runs.items():
        config = replace(config, parallel=load(lookup("parallel", parallel["kind"]), parallel))
        for steps in (*stops, STEPS):
            signals = chain([None] * steps, repeat(15))
            ended = run_training(config, Ranks(rank, world_size, rank, world_size), run, data=data, stop=signals.__next__)
        assert ended["status"] == "complete"


def figures(run, first=1):
    """[steps, 3] losses and gradient norms of a run that began with step ``first``."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(first, STEPS + 1))
    assert [line.get("events") for line in lines] == [["spawn_experts"] if line["step"] == SPAWN + 1 else None for line in lines]
    assert [bool(line["experts"]) for line in lines] == [line["step"] > SPAWN for line in lines]
    return torch.tensor([(line["loss"], line["loss_total"], line["grad_norm"]) for line in lines], dtype=torch.float64)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with an uninterrupted run on one rank in ``single``; configuration and data of all runs."""
    folder = tmp_path_factory.mktemp("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOETRAIN_CACHE", str(folder / "cache"))
        (folder / "text.txt").write_text("\n\n".join(f"{i} times {j} is {i * j}." for i in range(1, 30) for j in range(1, 12)))
        config = make_config(folder)
        data = prepare(config.data)
    train(0, 1, config, data, {folder / "single": dict(kind="single")})
    return folder, config, data


@pytest.fixture(scope="module")
def reference(workspace):
    return figures(workspace[0] / "single")


def test_every_layout_spawns_the_same_experts(workspace, reference):
    folder, config, data = workspace
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=STEPS))
    run_distributed(train, 2, config, data, {folder / name: parallel for name, parallel in LAYOUTS.items()})
    for name in LAYOUTS:
        assert_close(figures(folder / name), reference, kind="layout", name=name)


def test_a_run_stopped_before_at_and_after_the_event_goes_on_bit_for_bit(workspace, reference):
    folder, config, data = workspace
    # before the event, just before it, and after it
    train(0, 1, config, data, {folder / "stopped": dict(kind="single")}, stops=(2, 1, 1))
    assert torch.equal(figures(folder / "stopped"), reference)


def test_a_run_that_dies_in_the_event_meets_it_again(workspace, reference, monkeypatch):
    folder, config, data = workspace
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=2))
    run = {folder / "died": dict(kind="single")}
    with monkeypatch.context() as patch:
        patch.setenv(faults.VARIABLE, f"event.spawn:0:{SPAWN}:raise")
        with pytest.raises(faults.FaultError):
            train(0, 1, config, data, run)
    assert [path.name for path in (folder / "died" / "checkpoints").glob("*step*")] == ["step-00000002"]
    train(0, 1, config, data, run)
    assert torch.equal(figures(folder / "died"), reference)


@pytest.mark.parametrize("step", [SPAWN - 1, SPAWN, SPAWN + 1])
def test_a_checkpoint_around_the_event_resumes_on_two_ranks(workspace, reference, step):
    folder, config, data = workspace
    start = folder / "single" / "checkpoints" / f"step-{step:08}"
    resuming = replace(config, checkpoint=replace(config.checkpoint, resume=str(start)))
    run = folder / f"resumed-{step}"
    run_distributed(train, 2, resuming, data, {run: LAYOUTS["fssdp"]})
    assert_close(figures(run, step + 1), reference[step:], kind="layout")


def test_checkpoints_hold_one_expert_and_its_moments_before_the_event_and_name_it_afterwards(workspace):
    folder, *_ = workspace
    before, after = (checkpoint.read_info(folder / "single" / "checkpoints" / f"step-{step:08}") for step in (SPAWN, SPAWN + 1))
    assert before.info["events"] == [] and after.info["events"] == [{"name": "spawn_experts", "step": SPAWN}]
    matrices = {key for key in before.shapes if ".expert" in key}
    assert matrices == {
        f"{kind}.layers.1.ffn.expert.{matrix}.weight{moment}"
        for kind, moment in (("model", ""), ("optim", ".exp_avg"), ("optim", ".exp_avg_sq"))
        for matrix in ("w_gate", "w_up", "w_down")
    }
    assert not any(".router." in key for key in before.shapes)
    assert len([key for key in after.shapes if ".experts." in key]) == 4 * len(matrices)


@pytest.mark.parametrize(("step", "layers"), [(SPAWN, 0), (SPAWN + 1, 1)])
def test_a_run_is_opened_from_a_checkpoint_on_either_side(workspace, step, layers):
    folder, config, _ = workspace
    (folder / "single" / "config.yaml").write_text(yaml.safe_dump(dump(config)))
    found = restore(str(folder / "single" / "checkpoints" / f"step-{step:08}"), device="cpu")
    assert len(found.placed.model.moe_layers()) == layers
