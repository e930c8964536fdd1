"""Replays the vectors ``eplb-placement``: slots of DeepSeek's load balancer and the load of every rank."""

import numpy as np
import pytest
import torch

from moetrain.parallel.placement.baselines import eplb_slots
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

META, DATA = golden("eplb-placement")


@pytest.mark.parametrize("case", META["cases"], ids=lambda case: case["name"])
def test_slots_and_loads(case):
    name, ranks = case["name"], case["num_gpus"]
    grouping = (case["num_groups"], case["num_nodes"]) if case["policy"] == "hierarchical" else (1, 1)
    slots_of_layers = []
    for layer, loads in enumerate(DATA[f"{name}.weight"].numpy()):
        slots = eplb_slots(loads, case["num_replicas"], num_groups=grouping[0], num_nodes=grouping[1], num_ranks=ranks)
        copies = np.bincount(slots, minlength=len(loads))
        assert copies.tolist() == DATA[f"{name}.logcnt"][layer].tolist()
        rank_loads = (loads / copies)[slots].reshape(ranks, -1).sum(axis=1)
        assert_close(torch.from_numpy(rank_loads), DATA[f"{name}.gpu_load"][layer], kind="golden")
        slots_of_layers.append(slots)
    slots = np.stack(slots_of_layers)
    assert slots.tolist() == DATA[f"{name}.phy2log"].tolist()
    for layer, expected in enumerate(DATA[f"{name}.log2phy"].tolist()):
        for expert, places in enumerate(expected):
            assert sorted(place for place in places if place >= 0) == np.flatnonzero(slots[layer] == expert).tolist()
