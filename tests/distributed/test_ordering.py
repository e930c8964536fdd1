"""Ranks that are late at random places neither deadlock nor change a bit: the order of messages follows from the plan alone."""

import random
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import wraps
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moetrain.parallel.collectives import Work
from moetrain.parallel.layouts import FSSDPSettings, Layout
from moetrain.testing.distributed import run_distributed
from moetrain.testing.layouts import merge, train_steps
from moetrain.testing.scenarios import SCENARIOS
from moetrain.testing.table import random_plan

STEPS = 20
COLLECTIVES = ["all_to_all_single", "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"]
COLLECTIVES += [name for name in ("all_gather_single", "reduce_scatter_single") if hasattr(dist, name)]


def train_late(rank, world_size, scenario, layout, seed):
    """Train with random pauses of this rank, mostly short; returns the outcome and the number of pauses."""
    rng, pauses = random.Random(f"{seed}/{rank}"), 0

    def pausing(function):
        @wraps(function)
        def call(*args, **kwargs):
            nonlocal pauses
            if rng.random() < 0.3:
                pauses += 1
                time.sleep(min(0.02, rng.expovariate(1000)))
            return function(*args, **kwargs)

        return call

    with ExitStack() as patched:
        targets = [*((dist, name) for name in COLLECTIVES), (Work, "wait"), (torch.nn.Module, "__call__")]
        for target, name in targets:
            patched.enter_context(mock.patch.object(target, name, pausing(getattr(target, name))))
        return train_steps(rank, world_size, scenario, layout, 1, random_plan), pauses


@pytest.mark.parametrize(("transport", "recompute", "degree"), [("striped", False, 2), ("direct", True, 1)])
def test_late_ranks_change_nothing(transport, recompute, degree):
    scenario = replace(SCENARIOS["zipf"], steps=STEPS, recompute=recompute)
    layout = Layout("fssdp", 1, 4, FSSDPSettings(rematerialize=True, transport=transport, reshard_every=3), 2, degree)
    expected = merge(run_distributed(train_steps, 4, scenario, layout, 1, random_plan))
    outcomes, pauses = zip(*run_distributed(train_late, 4, scenario, layout, 5), strict=True)
    assert min(pauses) > 5 * STEPS
    actual = merge(list(outcomes))
    assert (actual.losses, actual.norms, actual.selected) == (expected.losses, expected.norms, expected.selected)
    assert all(torch.equal(actual.parameters[key], expected.parameters[key]) for key in expected.parameters)
