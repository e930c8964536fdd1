"""Replays the vectors ``fastermoe-shadow``: which experts are copied to all workers."""

import numpy as np
import pytest

from moetrain.parallel.placement.baselines import fastermoe_shadow
from moetrain.testing.golden import golden

SLUG = "fastermoe-shadow"
META, DATA = golden(SLUG)


@pytest.mark.parametrize("case", range(len(DATA["counts"])))
def test_shadowed_experts(case):
    hidden_size, expansion, bandwidth, flops = DATA["params"][case].tolist()
    found = fastermoe_shadow(
        DATA["counts"][case].numpy(), int(hidden_size), expansion, bandwidth, flops, META["constants"]["bytes_per_value"]
    )
    assert np.array_equal(found, DATA["shadow"][case].numpy() != 0)


def test_cases_differ_in_the_number_of_shadows():
    assert len(set(DATA["shadow"].sum(1).tolist())) > 1
