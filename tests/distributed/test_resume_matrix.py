"""Any layout resumes from any other: every pair, at 1, 2 and 4 ranks, goes on as one process would have."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from moetrain.parallel.layouts import FSSDPSettings, Layout
from moetrain.parallel.parallelize import local
from moetrain.parallel.reshard import restore_placement
from moetrain.testing.distributed import run_distributed
from moetrain.testing.layouts import Training
from moetrain.testing.scenarios import SCENARIOS
from moetrain.testing.tolerances import assert_close
from moetrain.train import checkpoint
from moetrain.train.checkpoint import Checkpointer
from moetrain.train.state import all_tensors, set_update_count

BEFORE, AFTER = 3, 2
"""Steps before the checkpoint and after it: the second of these shows that the moments were right."""
SCENARIO = replace(SCENARIOS["aux_free"], steps=BEFORE + AFTER)
MOVING = FSSDPSettings(extra_slots=1, reshard_every=2)
LAYOUTS = {
    "single": Layout("single", 1, 1),
    **{f"fsdp-{n}": Layout("fsdp", 1, n) for n in (1, 2, 4)},
    **{f"ep-{n}": Layout("ep", 1, n) for n in (1, 2, 4)},
    **{f"fssdp-{n}": Layout("fssdp", 1, n, MOVING) for n in (1, 2, 4)},
    **{f"fssdp-tensor-{n}": Layout("fssdp", 1, n // 2, MOVING, tensor=2) for n in (2, 4)},
}


def everywhere(function, layout, *arguments):
    """What the ranks of a layout return; they must agree."""
    if layout.world_size == 1:
        return function(0, 1, layout, *arguments)
    results = run_distributed(function, layout.world_size, layout, *arguments)
    assert all(result == results[0] for result in results), "ranks disagree"
    return results[0]


def go_on(training, first, steps):
    """(loss, gradient norm) of each step."""
    figures = []
    for step in range(first, first + steps):
        result = training.gradients(step)
        figures.append((result.loss, training.update(step, result)))
    return figures


def train(rank, world_size, layout, folder):
    """Three steps, a checkpoint, and two more. Whether experts had moved, and the figures of the last two steps."""
    training = Training.start(rank, SCENARIO, layout)
    placed = training.placed
    first = {name: executor.plan.owner.tolist() for name, executor in placed.executors().items()}
    go_on(training, 0, BEFORE)
    has_moved = first != {name: executor.plan.owner.tolist() for name, executor in placed.executors().items()}
    with Checkpointer(folder, keep=1) as checkpointer:
        checkpointer.save(BEFORE, all_tensors(placed, training.optimizer), {"placement": placed.placement_state()})
    return has_moved, go_on(training, BEFORE, AFTER)


@torch.no_grad()
def forget(training):
    """Spoil everything that a checkpoint must bring back."""
    model, states = training.placed.model, training.optimizer.state.values()
    for tensor in [*model.parameters(), *model.buffers(), *(t for state in states for t in state.values())]:
        local(tensor).fill_(torch.nan)


def resume(rank, world_size, layout, folders):
    """The figures of the two steps after each of these checkpoints."""
    training = Training.start(rank, SCENARIO, layout, seed=1)
    found = {}
    for source, folder in folders.items():
        forget(training)
        path = folder / f"step-{BEFORE:08}"
        restore_placement(training.placed, training.optimizer, checkpoint.read_info(path).info["placement"])
        checkpoint.load(path, all_tensors(training.placed, training.optimizer), complete=True)
        set_update_count(training.optimizer, BEFORE)
        found[source] = go_on(training, BEFORE, AFTER)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By layout: the folder of its checkpoint, whether experts had moved, the figures of the steps after it."""
    root = tmp_path_factory.mktemp("matrix")
    return {name: (root / name, *everywhere(train, layout, root / name)) for name, layout in LAYOUTS.items()}


@pytest.fixture(scope="module")
def resumed(trained):
    """Target -> source -> figures, each target run once."""
    folders: dict[str, Path] = {name: folder for name, (folder, *_) in trained.items()}
    return lru_cache(lambda target: everywhere(resume, LAYOUTS[target], folders))


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_any_layout_resumes_from_any_other(trained, resumed, source, target):
    expected = torch.tensor(trained["single"][2], dtype=torch.float64)
    assert_close(torch.tensor(resumed(target)[source], dtype=torch.float64), expected, kind="layout")
    assert_close(torch.tensor(trained[source][2], dtype=torch.float64), expected, kind="layout")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_resumes_from_itself_bit_for_bit(trained, resumed, layout):
    assert resumed(layout)[layout] == trained[layout][2]


@pytest.mark.parametrize("layout", ["fssdp-2", "fssdp-4", "fssdp-tensor-4"])
def test_experts_had_moved_before_the_checkpoint(trained, layout):
    assert trained[layout][1]
