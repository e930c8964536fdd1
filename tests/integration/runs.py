"""Running the command line on a toy model and a toy text, for the tests of this folder."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import PIPE

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


class Commands:
    """Commands forked from one process, see ``forked.py``."""

    def __init__(self):
        self.process = None

    def run(self, arguments, folder, env, timeout):
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, str(Path(__file__).with_name("forked.py"))]
            settings = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, env=settings, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True)
        with tempfile.NamedTemporaryFile("r") as stdout, tempfile.NamedTemporaryFile("r") as stderr:
            job = {"arguments": arguments, "folder": str(folder), "environment": env, "stdout": stdout.name, "stderr": stderr.name}
            print(json.dumps(job), file=self.process.stdin, flush=True)
            if not select.select([self.process.stdout], [], [], timeout)[0]:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                raise subprocess.TimeoutExpired(arguments, timeout, stdout.read(), stderr.read())
            return subprocess.CompletedProcess(arguments, int(self.process.stdout.readline()), stdout.read(), stderr.read())


COMMANDS = Commands()


def moetrain(*arguments, folder, timeout=120, **extra):
    """Run a command in a folder; returns the finished process. A command with a PYTHONPATH of its own starts as ``python -m
    moetrain``, others are forked."""
    env = environment(folder, **extra)
    if "PYTHONPATH" not in extra and sys.platform == "linux":
        return COMMANDS.run(arguments, folder, env, timeout)
    command = [sys.executable, "-m", "moetrain", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines(run)]
