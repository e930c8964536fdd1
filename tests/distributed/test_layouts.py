"""Every layout computes what one process computes: losses, outputs, gradients, norm and updated weights, in float64.

The cases are a part of the table in ``moetrain.testing.table``; ``scripts/check_layouts.py`` runs all of it.
"""

from dataclasses import replace

import pytest
import torch

from moetrain.testing.layouts import train_steps
from moetrain.testing.scenarios import SCENARIOS, compare
from moetrain.testing.table import selection


@pytest.mark.parametrize("cell", selection(), ids=str)
def test_a_layout_changes_nothing(cell):
    cell.check()


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("name", ["padded", "glam_capacity", "aux_free"])
def test_micro_batches_change_nothing(name, micro):
    compare(train_steps(0, 1, replace(SCENARIOS[name], micro_batch_size=micro), "single"), train_steps(0, 1, SCENARIOS[name], "single"))


@pytest.mark.parametrize("name", ["padded", "glam_capacity", "global_balance", "recurrent", "gating_residuals"])
def test_recomputation_is_bit_equal(name):
    plain, recomputed = (train_steps(0, 1, replace(SCENARIOS[name], recompute=r), "single") for r in (False, True))
    assert (plain.losses, plain.norms, plain.selected) == (recomputed.losses, recomputed.norms, recomputed.selected)
    assert all(torch.equal(plain.gradients[key], recomputed.gradients[key]) for key in plain.gradients)
