"""Replays the vectors ``eplb-placement``: replicas, their slots and the resulting loads."""

import numpy as np
import pytest

from moetrain.parallel.placement.baselines import eplb
from moetrain.testing.golden import golden

SLUG = "eplb-placement"
META, DATA = golden(SLUG)
CASES = {case["name"]: case for case in META["cases"]}


@pytest.mark.parametrize("name", CASES)
def test_replicas_and_slots(name):
    case = CASES[name]
    expected = {key.removeprefix(f"{name}."): value.numpy() for key, value in DATA.items() if key.startswith(f"{name}.")}
    groups, nodes = (1, 1) if case["policy"].startswith("global") else (case["num_groups"], case["num_nodes"])
    found = eplb(expected["weight"], case["num_replicas"], groups, nodes, case["num_gpus"])
    assert np.array_equal(found.replicas, expected["logcnt"])
    assert np.array_equal(found.logical, expected["phy2log"])
    # replicas of one expert have equal loads: their order is the sorting library's
    assert np.array_equal(np.sort(found.slots), np.sort(expected["log2phy"]))
    loads = found.rank_loads(expected["weight"], case["num_gpus"])
    np.testing.assert_allclose(loads, expected["gpu_load"], rtol=1e-6)
    np.testing.assert_allclose(loads.max(axis=1) / loads.mean(axis=1), case["max_over_mean"], atol=5e-5)


def test_every_tensor_belongs_to_a_case():
    assert {key.split(".")[0] for key in DATA} == set(CASES)
