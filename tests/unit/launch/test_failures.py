"""Failures of ranks: the cause is shown once, none is silent, and torchrun's ranks agree; with stand-ins for the training."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from moetrain.launch import local
from moetrain.launch.local import describe_failure
from moetrain.train.settings import LaunchSection


def child_failed(rank, exitcode):
    return SimpleNamespace(get_first_failure=lambda: (rank, SimpleNamespace(exitcode=exitcode)))


def leave(folder, rank, when, message, exit_code=1):
    (folder / f"{rank}.json").write_text(json.dumps({"time": when, "message": message, "exit_code": exit_code}))


def test_the_report_that_is_first_in_time_is_the_cause_not_the_lowest_rank(tmp_path):
    leave(tmp_path, 0, 20.0, "connection closed by peer")
    leave(tmp_path, 1, 10.0, "disk full", exit_code=3)
    error = describe_failure(child_failed(0, 1), tmp_path)
    assert str(error) == "disk full" and error.exit_code == 3


def test_a_killed_rank_is_the_cause_although_others_complain(tmp_path):
    leave(tmp_path, 0, 10.0, "connection closed by peer")
    error = describe_failure(child_failed(1, -signal.SIGKILL), tmp_path)
    assert "rank 1 was killed by SIGKILL" in str(error) and error.exit_code == 1


def test_a_rank_that_ends_silently_is_the_cause_although_others_complain(tmp_path):
    leave(tmp_path, 0, 10.0, "connection closed by peer")
    assert str(describe_failure(child_failed(1, 7), tmp_path)) == "rank 1 ended with exit status 7 and no message"


def test_interrupted_at_once_has_the_exit_code_of_ctrl_c(tmp_path):
    assert describe_failure(child_failed(0, 130), tmp_path).exit_code == 130


def test_a_failing_worker_leaves_its_own_traceback(tmp_path, monkeypatch):
    def run_rank(config, ranks, run_dir, data, stop):
        raise RuntimeError("the experts are on strike")

    monkeypatch.setattr(local, "load", lambda cls, plain: SimpleNamespace(train=SimpleNamespace(device="cpu"), launch=LaunchSection()))
    monkeypatch.setattr(local, "join_group", lambda ranks, choice, timeout_seconds: None)
    monkeypatch.setattr(local, "die_with_parent", lambda: None)
    monkeypatch.setattr(local, "run_rank", run_rank)
    monkeypatch.setattr(local, "PreparedData", lambda folder: None)
    with pytest.raises(SystemExit) as caught:
        local.worker(local.train_worker, ({}, str(tmp_path), str(tmp_path)), str(tmp_path), os.getppid())
    assert caught.value.code == 1
    message = str(describe_failure(child_failed(0, 1), tmp_path))
    assert "rank 0 failed" in message and "in run_rank" in message and "the experts are on strike" in message


def under_torchrun(tmp_path, program):
    """Run a Python program as two workers of torchrun; returns the finished process."""
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "program.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MOETRAIN_CACHE": str(tmp_path / "cache")}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)


FAKE_TRAINING = """
    import os, sys
    from types import SimpleNamespace
    import moetrain.launch.local as local
    from moetrain.cli import main
    from moetrain.errors import StorageError

    local.prepare_data = lambda config: SimpleNamespace(content_hash="the same")
    rank = int(os.environ["RANK"])
"""


def test_a_sweep_under_torchrun_does_not_hang_at_its_second_job_and_no_rank_fails_silently(tmp_path):
    program = """
    def run_rank(config, ranks, run_dir, data, stop):
        import torch
        total = torch.ones(())
        torch.distributed.all_reduce(total)
        if config.train.seed == 2 and ranks.rank == 1:
            raise StorageError("disk full")
        return {"status": "complete", "step": int(total), "run_dir": f"seed {config.train.seed}"}

    local.run_rank = run_rank
    sys.exit(main(["train", "-m", "train.seed=0,1,2", "logging.sample_prompt=null"]))
    """
    done = under_torchrun(tmp_path, FAKE_TRAINING + program)
    assert "run folder: seed 0" in done.stdout and "run folder: seed 1" in done.stdout, done.stderr
    assert done.returncode != 0 and done.stderr.count("moetrain: error on rank 1: disk full") == 1


def test_a_rank_with_another_configuration_is_named(tmp_path):
    done = under_torchrun(tmp_path, FAKE_TRAINING + '    sys.exit(main(["train", f"train.seed={rank}"]))\n')
    assert done.returncode != 0
    assert done.stderr.count("started with another configuration or other data than rank 0: rank 1") == 1
