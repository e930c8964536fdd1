"""Replays the vectors ``fssdp-plan``: load prediction, owners, copies, dispatch, and what the sparse collectives move."""

import numpy as np
import pytest

from moetrain.parallel.placement.cost import gather_traffic
from moetrain.parallel.placement.dispatch import node_matrix, rank_loads, split_even
from moetrain.parallel.placement.plan import Cluster, PlacementPlan, messages
from moetrain.parallel.placement.planners import even_sharding, heterogeneous_sharding, sparse_materialization
from moetrain.parallel.placement.predict import SlidingWindow
from moetrain.testing.golden import golden

SLUG = "fssdp-plan"
META, TENSORS = golden(SLUG)
DATA = {key: value.numpy() for key, value in TENSORS.items()}
C = META["constants"]
RANKS, EXPERTS, LAYERS = C["D"], C["E"], C["L"]
CLUSTER = Cluster.even(C["N"], C["G"])
CASES = {case["name"]: case for case in META["cases"]}
SHARDINGS = [name for name in CASES if CASES[name]["algorithm"] == "heterogeneous sharding"]
MATERIALIZATIONS = [name for name in CASES if CASES[name]["algorithm"] == "sparse materialisation"]
DISPATCHED = [name for name in MATERIALIZATIONS if f"{name}.dispatch" in DATA]


def stored_plan(name, layer):
    return PlacementPlan(DATA[CASES[name]["owner"]][layer], DATA[f"{name}.placement"][layer] != 0)


def test_every_tensor_is_replayed():
    known = {"counts", "loads", "load_history", "load_prediction", "owner_even", "spag.chunks", "spag.result", "sprs.grads", "sprs.result"}
    known |= {f"{name}.owner" for name in SHARDINGS} | {f"{name}.placement" for name in MATERIALIZATIONS}
    kinds = ("dispatch", "device_load", "node_matrix", "recv_chunks", "node_imports")
    assert set(DATA) == known | {f"{name}.{kind}" for name in DISPATCHED for kind in kinds} and DISPATCHED


def test_load_prediction():
    predictor = SlidingWindow()
    for loads in DATA["load_history"]:
        predictor.push(loads)
    np.testing.assert_allclose(predictor.mean(), DATA["load_prediction"], rtol=1e-15)
    assert np.array_equal(predictor.predict(), np.floor(DATA["load_prediction"] + 0.5))


def test_even_sharding():
    assert np.array_equal(DATA["loads"], DATA["counts"].sum(1))
    assert np.array_equal(np.tile(even_sharding(EXPERTS, RANKS), (LAYERS, 1)), DATA["owner_even"])


@pytest.mark.parametrize("name", SHARDINGS)
def test_heterogeneous_sharding(name):
    owners = heterogeneous_sharding(DATA["loads"], CLUSTER, CASES[name]["t"])
    assert np.array_equal(owners, DATA[f"{name}.owner"])
    assert np.bincount(owners.ravel(), minlength=RANKS).tolist() == CASES[name]["experts_per_device"]


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", MATERIALIZATIONS)
def test_sparse_materialization(name, layer):
    case = CASES[name]
    plan = sparse_materialization(DATA["loads"][layer], DATA[case["owner"]][layer], CLUSTER, case["t"], case["m"], case["rule"])
    plan.validate(case["m"])
    assert np.array_equal(plan.holders, DATA[f"{name}.placement"][layer] != 0)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", DISPATCHED)
def test_dispatch_and_traffic(name, layer):
    plan = stored_plan(name, layer)
    split = split_even(DATA["counts"][layer], plan, CLUSTER)
    assert np.array_equal(split, DATA[f"{name}.dispatch"][layer])
    assert np.array_equal(rank_loads(split), DATA[f"{name}.device_load"][layer])
    assert np.array_equal(node_matrix(split, CLUSTER), DATA[f"{name}.node_matrix"][layer])
    direct, staged = gather_traffic(plan, CLUSTER, "direct"), gather_traffic(plan, CLUSTER, "two_stage")
    for traffic in (direct, staged):
        assert np.array_equal(traffic.received_intra + traffic.received_inter, DATA[f"{name}.recv_chunks"][layer])
    assert np.array_equal(CLUSTER.membership @ staged.received_inter, DATA[f"{name}.node_imports"][layer])


def sparse_placement():
    """The stored placement whose copies are those that the sparse all-gather of the vectors made."""
    present = np.abs(DATA["spag.result"]).sum(2).T > 0
    matching = [name for name in MATERIALIZATIONS if np.array_equal(stored_plan(name, 0).holders, present)]
    assert matching
    return stored_plan(matching[0], 0)


def test_sparse_all_gather_and_reduce_scatter_follow_the_messages():
    plan = sparse_placement()
    expert = np.arange(EXPERTS)
    chunks = np.zeros_like(DATA["spag.result"])
    chunks[plan.owner, expert] = DATA["spag.chunks"]
    summed = DATA["sprs.grads"][plan.owner, expert].copy()
    for source, destination, e in messages(plan):
        assert source == plan.owner[e]
        chunks[destination, e] = chunks[source, e]
        summed[e] += DATA["sprs.grads"][destination, e]
    assert np.array_equal(chunks, DATA["spag.result"])
    np.testing.assert_allclose(summed, DATA["sprs.result"], rtol=0, atol=1e-14)
