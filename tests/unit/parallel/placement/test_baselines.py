"""FasterMoE's shadows and EPLB: properties beyond the stored vectors."""

import numpy as np
import pytest

from moetrain.parallel.placement.baselines import eplb, fastermoe_shadow


def latency(loads, shadows, hidden_size, expansion, bandwidth, flops):
    compute = 12 * expansion * hidden_size**2 / flops + 16 * hidden_size / bandwidth
    return compute * loads[~shadows].max(initial=0) + shadows.sum() * 8 * expansion * hidden_size**2 / bandwidth


def test_shadows_lower_the_modelled_latency_until_one_more_would_not(skewed_counts):
    numbers = set()
    for bandwidth in (1e8, 1e9, 1e10, 1e12):
        counts, setting = skewed_counts(4, 12, tokens=20_000), (64, 4, bandwidth, 1e12)
        loads = counts.sum(axis=0)
        shadows = fastermoe_shadow(counts, *setting)
        order = np.argsort(-loads, kind="stable")
        steps = [latency(loads, np.isin(np.arange(12), order[:k]), *setting) for k in range(13)]
        k = shadows.sum()
        numbers.add(int(k))
        assert set(np.flatnonzero(shadows)) == set(order[:k])
        assert all(a > b for a, b in zip(steps[:k], steps[1 : k + 1], strict=True)) and (k == 12 or steps[k + 1] >= steps[k])
    assert len(numbers) > 1


@pytest.mark.parametrize(("replicas", "groups", "nodes", "gpus"), [(16, 4, 2, 8), (24, 1, 1, 8), (16, 4, 2, 4), (24, 3, 2, 6)])
def test_every_expert_has_replicas_and_gpus_have_equal_slots(replicas, groups, nodes, gpus, rng):
    loads = rng.integers(1, 1000, size=(3, 12))
    found = eplb(loads, replicas, groups, nodes, gpus)
    assert found.logical.shape == (3, replicas) and found.replicas.min() >= 1 and (found.replicas.sum(axis=1) == replicas).all()
    np.testing.assert_allclose(found.rank_loads(loads, gpus).sum(axis=1), loads.sum(axis=1), rtol=1e-5)
    for layer in range(3):
        plan = found.plan(layer, gpus)
        plan.validate()
        for rank, slots in enumerate(found.logical[layer].reshape(gpus, -1)):
            assert set(plan.slots(rank)) == set(slots)


def test_more_replicas_balance_better(rng):
    loads = rng.lognormal(7, 1.3, size=(4, 16)).astype(np.int64)
    busiest = [eplb(loads, replicas, 1, 1, 8).rank_loads(loads, 8).max(axis=1).mean() for replicas in (16, 24, 48)]
    assert busiest[0] > busiest[1] > busiest[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((16, 5, 1, 8), "12 experts"), ((15, 4, 2, 8), "15 replicas"), ((14, 4, 2, 7), "7 GPUs"), ((8, 4, 2, 8), "too few")],
)
def test_numbers_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        eplb(np.ones((1, 12), dtype=np.int64), *arguments)
