"""The table of router costs knows every router and preset, and measures what it says."""

from pathlib import Path

import pytest

import moetrain.components  # noqa: F401
from moetrain import registry
from moetrain.launch.compose import shipped

ROUTERS = list(dict.fromkeys([*registry.components("router"), *shipped("router")]))


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "scripts" / "bench"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the script sets it for itself
    import router_cost

    return router_cost


def test_bounds_are_of_routers_and_presets_that_exist(bench):
    assert bench.BOUNDS.keys() <= set(ROUTERS)
    assert all(bound > bench.LINEAR and pays for bound, pays in bench.BOUNDS.values())


def test_presets_are_measured_with_the_sizes_of_the_table(bench):
    configs = bench.configurations(["mixtral", "smoe_dropout", "rmoe"])
    assert configs["mixtral"].top_k == bench.K and configs["smoe_dropout"].top_k == bench.E and configs["rmoe"].kind == "recurrent_topk"


def test_a_round_runs_each_router_once(bench):
    configs = bench.configurations([bench.PLAIN, "hash"])
    seconds = bench.measure({name: bench.timed(bench.build(config)) for name, config in configs.items()}, rounds=1)
    assert [len(values) for values in seconds.values()] == [1, 1] and 0 < seconds["hash"][0] < seconds[bench.PLAIN][0]
