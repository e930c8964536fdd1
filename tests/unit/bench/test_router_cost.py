"""The table of router costs knows every router and preset, and measures what it says."""

import pytest
from router_cost import BOUNDS, PLAIN, K, build, configurations, main, measure, timed

import moetrain.components  # noqa: F401
from moetrain import registry
from moetrain.launch.compose import shipped


def test_bounds_are_of_routers_and_presets_that_exist():
    assert BOUNDS.keys() <= {*registry.components("router"), *shipped("router")}
    assert all(bound > 1.3 and pays for bound, pays in BOUNDS.values())


def test_every_router_is_configured_with_the_sizes_of_the_table():
    configs = configurations([*registry.components("router"), *shipped("router")])
    assert {getattr(config, "top_k", K) for config in configs.values()} == {1, 2, K, 64}
    assert configs["glam"].kind == PLAIN and configs["rmoe"].kind == "recurrent_topk"


def test_a_round_runs_each_router_once():
    seconds = measure({name: timed(build(config)) for name, config in configurations([PLAIN, "hash"]).items()}, rounds=1)
    assert [len(values) for values in seconds.values()] == [1, 1] and 0 < seconds["hash"][0] < seconds[PLAIN][0]


def test_unknown_names_are_refused():
    with pytest.raises(Exception, match="nope"):
        main(["--only", "nope"])
