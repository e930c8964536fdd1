"""Interrupted runs continue as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import TINY, environment, lines, losses, moetrain

EP = ["parallel=ep", "launch.nproc_per_node=2"]


def start(*arguments, folder, **extra):
    return subprocess.Popen([sys.executable, "-m", "moetrain", "train", *TINY, *arguments], cwd=folder, env=environment(folder, **extra),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def wait_for_step(run, step, timeout=60):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{run} did not reach step {step}")


def close(actual, expected, relative=1e-10):
    assert [a[0] for a in actual] == [e[0] for e in expected]
    for a, e in zip(actual, expected, strict=True):
        assert abs(a[1] - e[1]) <= relative * abs(e[1])
        assert abs(a[2] - e[2]) <= relative * abs(e[2])


@pytest.fixture(scope="module")
def two_ranks(workspace):
    """Losses of the uninterrupted run on two ranks."""
    done = moetrain("train", *TINY, *EP, "run.dir=two-ranks", folder=workspace)
    assert done.returncode == 0, done.stderr
    return losses(workspace / "two-ranks")


def test_two_ranks_give_the_same_losses(workspace, reference, two_ranks):
    close(two_ranks, reference)
    assert [line["tokens"] for line in lines(workspace / "two-ranks")] == [4 * 16] * 8


@pytest.mark.parametrize("layout", ["fsdp", "ep parallel.tensor=2", "ep parallel.tensor=2 launch.nproc_per_node=4"])
def test_several_ranks_give_the_same_losses(workspace, reference, layout):
    run = layout.replace(" ", "-")
    done = moetrain("train", *TINY, "launch.nproc_per_node=2", *f"parallel={layout}".split(), f"run.dir='{run}'", folder=workspace)
    assert done.returncode == 0, done.stderr
    close(losses(workspace / run), reference)
    assert [line["tokens"] for line in lines(workspace / run)] == [4 * 16] * 8


def test_kill_one_process_and_continue_bit_for_bit(workspace, reference):
    killed = start("run.dir=killed", folder=workspace, MOETRAIN_FAULT="step.begin:0:6:kill")
    assert killed.wait(60) == -signal.SIGKILL
    again = moetrain("train", *TINY, "run.dir=killed", folder=workspace)
    assert again.returncode == 0, again.stderr
    assert "continuing after step 4" in again.stdout
    assert losses(workspace / "killed") == reference


def test_schedules_of_the_router_continue_bit_for_bit(workspace):
    """More and more experts, and a router that is trained in the middle of training only."""
    settings = ["router.top_k_start=1", "router.top_k=4", "router.trained_from=0.3", "router.trained_until=0.9"]
    whole = moetrain("train", *TINY, *settings, "run.dir=schedules-whole", folder=workspace)
    assert whole.returncode == 0, whole.stderr
    killed = start(*settings, "run.dir=schedules-killed", folder=workspace, MOETRAIN_FAULT="step.begin:0:6:kill")
    assert killed.wait(60) == -signal.SIGKILL
    again = moetrain("train", *TINY, *settings, "run.dir=schedules-killed", folder=workspace)
    assert again.returncode == 0, again.stderr
    assert losses(workspace / "schedules-killed") == losses(workspace / "schedules-whole")


@pytest.mark.parametrize("rank", [0, 1])
def test_kill_a_rank_and_continue_bit_for_bit(workspace, two_ranks, rank):
    run = f"ep-killed-{rank}"
    killed = start(*EP, f"run.dir={run}", folder=workspace, MOETRAIN_FAULT=f"step.begin:{rank}:6:kill")
    _, stderr = killed.communicate(timeout=60)
    assert killed.returncode == 1
    assert f"rank {rank} was killed by SIGKILL" in stderr
    again = moetrain("train", *TINY, *EP, f"run.dir={run}", folder=workspace)
    assert again.returncode == 0, again.stderr
    assert losses(workspace / run) == two_ranks


def test_kill_a_rank_whose_experts_have_moved_continue_bit_for_bit_then_resume_on_one_rank(workspace):
    moving = ["parallel=fssdp", "parallel.fssdp.reshard_every=2", "launch.nproc_per_node=2", "schedule=constant"]
    assert moetrain("train", *TINY, *moving, "run.dir=moving", "train.steps=10", folder=workspace).returncode == 0
    whole = losses(workspace / "moving")
    killed = start(*moving, "run.dir=moving-killed", folder=workspace, MOETRAIN_FAULT="step.begin:1:6:kill")
    _, stderr = killed.communicate(timeout=120)
    assert "rank 1 was killed by SIGKILL" in stderr
    assert any(line.get("experts_moved") for line in lines(workspace / "moving-killed") if line["step"] <= 4)
    again = moetrain("train", *TINY, *moving, "run.dir=moving-killed", folder=workspace)
    assert "continuing after step 4" in again.stdout, again.stderr
    assert losses(workspace / "moving-killed") == whole[:8]
    alone = ["parallel=ep", "launch.nproc_per_node=1", "schedule=constant", "train.steps=10"]
    last = moetrain("train", *TINY, *alone, "run.dir=moving-killed", folder=workspace)
    assert "continuing after step 8" in last.stdout, last.stderr
    close(losses(workspace / "moving-killed"), whole)


def test_kill_the_launcher_leaves_no_orphans_and_the_run_continues(workspace):
    run = workspace / "launcher-killed"
    killed = start(*EP, "train.steps=400", "run.dir=launcher-killed", folder=workspace)
    wait_for_step(run, 5)
    children = [int(pid) for pid in Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()]
    assert children
    killed.kill()
    killed.wait()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)
    again = moetrain("train", *TINY, *EP, "run.dir=launcher-killed", folder=workspace)
    assert again.returncode == 0, again.stderr
    steps = [line["step"] for line in lines(run)]
    assert steps == sorted(set(steps)) and steps[-1] >= 8


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_stops_after_the_step_with_a_checkpoint(workspace, number, code, ranks):
    name = f"signal-{number}-{ranks}"
    # no checkpoint is due before the end: the one that is found was written because of the signal
    extra = [f"launch.nproc_per_node={ranks}", "train.steps=2000", "checkpoint.every_steps=5000", f"run.dir={name}"]
    running = start(*extra, folder=workspace)
    wait_for_step(workspace / name, 3)
    running.send_signal(number)
    stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == code, stderr
    assert "stopped after step" in stdout
    last = lines(workspace / name)[-1]["step"]
    assert (workspace / name / "checkpoints" / f"step-{last:08}" / "manifest.json").exists()


def test_four_ranks_then_two_then_one(workspace, reference):
    common = ["run.dir=reshard"]
    assert (
        moetrain(
            "train", *TINY, *common, "parallel=ep", "launch.nproc_per_node=4", "train.steps=3", "schedule=constant", folder=workspace
        ).returncode
        == 0
    )
    assert (
        moetrain(
            "train", *TINY, *common, "parallel=fsdp", "launch.nproc_per_node=2", "train.steps=6", "schedule=constant", folder=workspace
        ).returncode
        == 0
    )
    assert moetrain("train", *TINY, *common, "parallel=single", "train.steps=8", "schedule=constant", folder=workspace).returncode == 0
    assert moetrain("train", *TINY, "run.dir=whole", "schedule=constant", folder=workspace).returncode == 0
    close(losses(workspace / "reshard"), losses(workspace / "whole"))
    changes = (workspace / "reshard" / "config_changes.jsonl").read_text()
    assert "parallel.kind" in changes and "train.steps" in changes


def test_recomputation_is_bit_equal(workspace, reference):
    assert moetrain("train", *TINY, "train.recompute=true", "run.dir=recompute", folder=workspace).returncode == 0
    assert losses(workspace / "recompute") == reference


def test_asynchronous_checkpoints_resume_bit_for_bit(workspace, reference):
    extra = ["checkpoint.async_save=true", "run.dir=async"]
    start(*extra, folder=workspace, MOETRAIN_FAULT="step.begin:0:8:kill").wait(60)
    assert moetrain("train", *TINY, *extra, folder=workspace).returncode == 0
    assert losses(workspace / "async") == reference


def test_a_finished_run_is_not_trained_again(workspace, reference):
    again = moetrain("train", *TINY, "run.dir=reference", folder=workspace)
    assert again.returncode == 0 and "continuing after step 8" in again.stdout
    assert losses(workspace / "reference") == reference


def test_resume_with_another_model_is_refused(workspace):
    refused = moetrain("train", *TINY, "run.dir=reference", "model.hidden_size=32", "train.seed=5", folder=workspace)
    assert refused.returncode == 2
    assert "model.hidden_size = 32" in refused.stderr and "train.seed = 5" in refused.stderr and "16" in refused.stderr


def test_resume_with_other_data_of_the_same_name_is_refused(workspace):
    (workspace / "changing.txt").write_text((workspace / "text.txt").read_text())
    extra = ["data.path=changing.txt", "run.dir=changing", "train.steps=2"]
    assert moetrain("train", *TINY, *extra, folder=workspace).returncode == 0
    (workspace / "changing.txt").write_text((workspace / "text.txt").read_text() + "\n\nand one more line.")
    refused = moetrain("train", *TINY, *extra[:2], folder=workspace)
    assert refused.returncode == 2 and "was trained on other data" in refused.stderr
    assert [line["step"] for line in lines(workspace / "changing")] == [1, 2]


def test_a_run_is_evaluated_from_another_working_directory(workspace, reference, tmp_path):
    evaluated = moetrain("evaluate", f"run={workspace / 'reference'}", folder=tmp_path, MOETRAIN_CACHE=str(workspace / "cache"))
    assert evaluated.returncode == 0 and "perplexity" in evaluated.stdout, evaluated.stderr


def test_a_signal_before_the_workers_are_there_is_not_lost(workspace):
    running = start(*EP, "train.steps=100000", "run.dir=early", folder=workspace)
    deadline = time.monotonic() + 60
    while not (workspace / "early" / "config.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 143, stderr


def test_start_from_another_runs_weights(workspace, reference):
    extra = [f"checkpoint.resume={workspace / 'reference'}", "train.steps=10", "run.dir=extended"]
    assert moetrain("train", *TINY, *extra, folder=workspace).returncode == 0
    assert [line["step"] for line in lines(workspace / "extended")] == [9, 10]


def test_never_starts_afresh_in_a_folder_of_its_own(workspace):
    first = moetrain("train", *TINY, "train.steps=2", "run.root=fresh", folder=workspace)
    second = moetrain("train", *TINY, "train.steps=2", "run.root=fresh", "checkpoint.resume=never", folder=workspace)
    assert first.returncode == second.returncode == 0
    assert [folder.name.endswith("-2") for folder in sorted((workspace / "fresh").iterdir(), key=lambda folder: len(folder.name))] == [
        False,
        True,
    ]
    refused = moetrain("train", *TINY, "run.dir=reference", "checkpoint.resume=never", folder=workspace)
    assert refused.returncode == 2 and "holds a run already" in refused.stderr


def test_a_full_disk_leaves_the_last_checkpoint(workspace, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(mount)], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a small file system")
    try:
        full = moetrain("train", *TINY, f"run.dir={mount / 'run'}", "checkpoint.keep=50", "train.steps=60", folder=workspace)
        assert full.returncode == 3, full.stderr
        assert "No space left" in full.stderr and "Traceback" not in full.stderr
        assert list((mount / "run" / "checkpoints").glob("step-*/manifest.json"))
        evaluated = moetrain("evaluate", f"run={mount / 'run'}", folder=workspace)
        assert evaluated.returncode == 0 and "perplexity" in evaluated.stdout, evaluated.stderr
    finally:
        subprocess.run(["umount", str(mount)], check=True)
