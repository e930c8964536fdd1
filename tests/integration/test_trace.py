"""Traces of steps by torch.profiler."""

import gzip
import json

import pytest
from runs import TINY, moetrain

PHASES = {"train.data", "train.forward", "train.backward", "train.gradients", "train.optimizer"}
STAGES = {"moe.router", "moe.capacity", "moe.losses", "moe.execute", "moe.experts", "moe.shared"}
BETWEEN_RANKS = {"comm.dispatch", "comm.combine", "comm.sparse_all_gather", "comm.sparse_reduce_scatter"}


def ranges(path):
    """How often each range of ours is in a trace."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X" and event["name"].startswith(("train.", "moe.", "comm."))]
    return {name: names.count(name) for name in set(names)}


def train(workspace, name, *overrides):
    done = moetrain("train", *TINY, f"run.dir={name}", *overrides, folder=workspace)
    assert done.returncode == 0, done.stderr
    return workspace / name / "traces"


def test_one_process(workspace):
    found = ranges(train(workspace, "profiled", "metrics.profile_step=2", "metrics.profile_steps=2") / "rank0.json.gz")
    assert found.keys() >= PHASES | STAGES
    assert found["train.forward"] == found["moe.router"] == 2  # one MoE layer, two steps


def test_two_ranks_with_copies(workspace):
    layout = ["launch.nproc_per_node=2", "parallel=fssdp", "parallel.fssdp.planner=everywhere", "parallel.fssdp.extra_slots=2"]
    folder = train(workspace, "profiled_ranks", *layout, "metrics.profile_step=3", "metrics.profile_steps=1")
    for rank in range(2):
        found = ranges(folder / f"rank{rank}.json.gz")
        assert found.keys() >= PHASES | STAGES | BETWEEN_RANKS
        assert found["train.optimizer"] == 1


def test_a_resumed_run_traces_the_rest_of_the_steps(workspace):
    train(workspace, "profiled_resumed", "train.steps=4")
    folder = train(workspace, "profiled_resumed", "train.steps=8", "metrics.profile_step=3", "metrics.profile_steps=4")
    assert ranges(folder / "rank0.json.gz")["train.forward"] == 2  # 5 and 6
    (folder / "rank0.json.gz").unlink()
    train(workspace, "profiled_resumed", "train.steps=10", "metrics.profile_step=3", "metrics.profile_steps=4")
    assert not (folder / "rank0.json.gz").exists()


@pytest.mark.parametrize("override", ["metrics.profile_step=9", "metrics.profile_step=0", "metrics.profile_steps=0"])
def test_steps_that_cannot_be_traced_are_refused(workspace, override):
    done = moetrain("train", *TINY, "run.dir=refused", override, folder=workspace)
    assert done.returncode == 2 and override.partition("=")[0] in done.stderr
