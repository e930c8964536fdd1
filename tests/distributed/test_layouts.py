"""Every layout computes what one process computes: losses, gradients, norm and updated weights, in float64."""

from dataclasses import replace

import pytest
import torch

from moetrain.testing.distributed import run_distributed
from moetrain.testing.layouts import merge, train_steps
from moetrain.testing.scenarios import SCENARIOS, compare

LAYOUTS = [("ep", 2, 1), ("ep", 4, 1), ("fsdp", 2, 1), ("ep", 4, 2), ("fsdp", 4, 2), ("ep", 3, 1)]
PAIRS = [(name, LAYOUTS[(i + j) % 5]) for i, name in enumerate(SCENARIOS) for j in range(2)] + [("deepseek", LAYOUTS[4])]


@pytest.mark.parametrize(("name", "layout"), PAIRS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)))
def test_a_layout_changes_nothing(name, layout):
    kind, world_size, replicate = layout
    scenario = SCENARIOS[name]
    expected = train_steps(0, 1, scenario, "single")
    actual = merge(run_distributed(train_steps, world_size, scenario, kind, replicate))
    compare(actual, expected)


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("name", ["padded", "glam_capacity", "aux_free"])
def test_micro_batches_change_nothing(name, micro):
    compare(train_steps(0, 1, replace(SCENARIOS[name], micro_batch_size=micro), "single"), train_steps(0, 1, SCENARIOS[name], "single"))


@pytest.mark.parametrize("name", ["padded", "glam_capacity", "global_balance"])
def test_recomputation_is_bit_equal(name):
    plain, recomputed = (train_steps(0, 1, replace(SCENARIOS[name], recompute=r), "single") for r in (False, True))
    assert (plain.losses, plain.norms, plain.selected) == (recomputed.losses, recomputed.norms, recomputed.selected)
    assert all(torch.equal(plain.gradients[key], recomputed.gradients[key]) for key in plain.gradients)
