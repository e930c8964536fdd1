"""Replays the vectors ``fastermoe-shadow``: the experts that FasterMoE copies to all workers."""

import pytest

from moetrain.parallel.placement.baselines import shadowed_experts
from moetrain.testing.golden import golden

META, DATA = golden("fastermoe-shadow")
VALUE_BYTES = META["constants"]["bytes_per_value"]


@pytest.mark.parametrize("case", range(len(DATA["counts"])))
def test_shadowed_experts(case):
    hidden, ratio, bandwidth, flops = DATA["params"][case].tolist()
    loads = DATA["counts"][case].sum(0).numpy()
    matrices = 2 * ratio * hidden**2
    token_seconds = 3 * 2 * matrices / flops + 4 * hidden * VALUE_BYTES / bandwidth
    expert_seconds = matrices * VALUE_BYTES / bandwidth
    shadowed = shadowed_experts(loads, token_seconds, expert_seconds)
    assert shadowed.tolist() == DATA["shadow"][case].bool().tolist()

    def latency(chosen):
        return token_seconds * loads[~chosen].max(initial=0) + expert_seconds * chosen.sum()

    assert latency(shadowed) <= latency(shadowed & False)
