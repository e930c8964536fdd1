"""Running the command line on a toy model and a toy text, for the tests of this folder."""

import json
import os
import subprocess
import sys

TINY = [
    "train.dtype=float64", "train.steps=8", "train.global_batch_size=4", "data=text", "data.path=text.txt", "data.split=paragraph",
    "data.tokenizer=bytes", "data.seq_len=16", "data.eval_fraction=0.1", "model.hidden_size=16", "model.num_layers=2",
    "model.num_heads=2", "model.head_dim=8", "model.num_experts=4", "model.top_k=2", "model.expert_width=8", "model.shared_width=8",
    "model.dense_width=16", "logging.sample_prompt=null", "checkpoint.every_steps=2", "schedule.warmup_steps=2",
]  # fmt: skip


def write_text(folder):
    lines = [f"{i} times {j} is {i * j}, and {j} plus {i} is {i + j}." for i in range(1, 30) for j in range(1, 12)]
    (folder / "text.txt").write_text("\n\n".join(lines))


def environment(folder, **extra):
    return {**os.environ, "MOETRAIN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", **extra}


def moetrain(*arguments, folder, timeout=120, **extra):
    """Run ``python -m moetrain`` in a folder; returns the finished process."""
    command = [sys.executable, "-m", "moetrain", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(folder, **extra), capture_output=True, text=True, timeout=timeout)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines(run)]
