"""Fitting linear costs, and what a machine's profile says about a cluster."""

import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moetrain.errors import ConfigError
from moetrain.parallel.placement.schedule import TASKS, best_degree, makespan
from moetrain.parallel.profile import COLLECTIVES, LinearCost, Machine, MachineProfile, Sweep, fit, load_profile, measure
from moetrain.testing.distributed import run_distributed

TINY = dict(
    min_bytes=256, max_bytes=4096, num_sizes=3, repeats=2, num_experts=2, hidden_size=8, expert_width=8, min_rows=1, max_rows=8
)  # fmt: skip


def machine(world_size, ranks_per_node):
    return Machine(
        world_size,
        ranks_per_node,
        backend="gloo",
        device="Test (R) CPU @ 1 GHz",
        dtype="float32",
        torch_version="2",
        date="2025-01-01T00:00:00+00:00",
    )


def link(alpha, beta):
    return {name: LinearCost(alpha, beta) for name in COLLECTIVES}


def test_exact_times_give_back_the_line():
    sizes = np.geomspace(1e3, 1e12, 7)
    cost = fit(sizes, 2e-5 + 3e-10 * sizes)
    assert math.isclose(cost.alpha, 2e-5, rel_tol=1e-9) and math.isclose(cost.beta, 3e-10, rel_tol=1e-9)
    assert math.isclose(cost.r_squared, 1.0) and math.isclose(cost.seconds(1e6), 2e-5 + 3e-4, rel_tol=1e-9)
    assert cost.samples[0] == (1e3, pytest.approx(2e-5 + 3e-7))


def test_noise_of_large_sizes_does_not_hide_the_start_up_time():
    sizes = np.geomspace(1e3, 1e8, 9)
    true = 1e-4 + 1e-9 * sizes
    for seed in range(20):
        noisy = fit(sizes, true * np.random.default_rng(seed).uniform(0.9, 1.1, sizes.size))
        assert 0.85 < noisy.alpha / 1e-4 < 1.15 and 0.85 < noisy.beta / 1e-9 < 1.15
        assert 0.9 < noisy.r_squared < 1.0


@pytest.mark.parametrize(("times", "zero"), [([1.0, 2.2, 3.6], "alpha"), ([3.0, 2.0, 1.0], "beta"), ([2.0, 2.0, 2.0], "beta")])
def test_costs_are_never_negative_and_are_the_best_that_are_not(times, zero):
    sizes = [1.0, 2.0, 3.0]
    cost = fit(sizes, times)
    assert math.isclose(getattr(cost, zero), 0.0, abs_tol=1e-12) and cost.alpha + cost.beta > 0

    def error(alpha, beta):
        return sum(((alpha + beta * n) / t - 1) ** 2 for n, t in zip(sizes, times, strict=True))

    for step_alpha, step_beta in ((1e-3, 0.0), (0.0, 1e-3), (-1e-3, 0.0), (0.0, -1e-3), (1e-3, -1e-3)):
        alpha, beta = cost.alpha + step_alpha, cost.beta + step_beta
        if min(alpha, beta) >= 0:
            assert error(alpha, beta) >= error(cost.alpha, cost.beta)


@pytest.mark.parametrize(("work", "seconds"), [([5.0], [1.0]), ([5.0, 5.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 1.0])])
def test_what_cannot_be_fitted_is_refused(work, seconds):
    with pytest.raises(ValueError, match="two different sizes"):
        fit(work, seconds)


def test_bandwidths_are_those_of_what_leaves_a_rank_and_a_node():
    profile = MachineProfile(machine(8, 4), link(1e-5, 1e-9), link(3e-5, 8e-9), LinearCost(4e-6, 1e-12), num_experts=4)
    cluster = profile.cluster((0, 0, 1, 1, 1))
    # of a buffer of n bytes 3/4 leave a rank for its node, and 1/2 a node for the other, from each of its 4 ranks
    assert math.isclose(cluster.intra_bandwidth, 0.75e9) and math.isclose(cluster.inter_bandwidth, 4 * 0.5 / 8e-9)
    assert (cluster.node_of, cluster.latency) == ((0, 0, 1, 1, 1), 3e-5)
    assert math.isclose(cluster.flops, 1e12) and math.isclose(cluster.expert_latency, 1e-6)
    assert profile.cluster((0, 0)).latency == 1e-5


def test_links_that_were_not_measured_are_an_error_only_where_they_are_needed():
    profile = MachineProfile(machine(2, 2), link(1e-5, 1e-9), {}, LinearCost(0.0, 1e-12), num_experts=4)
    assert math.isclose(profile.cluster((0, 0)).intra_bandwidth, 0.5e9)
    with pytest.raises(ConfigError, match="1 x 2 ranks has no links between nodes"):
        profile.cluster((0, 0, 1, 1))
    alone = MachineProfile(machine(1, 1), {}, {}, LinearCost(0.0, 1e-12), num_experts=4)
    assert alone.cluster((0,)).num_ranks == 1
    with pytest.raises(ConfigError, match="no links within a node"):
        alone.cluster((0, 0))
    with pytest.raises(ConfigError, match="no collective was measured"):
        alone.chunk_costs(dict.fromkeys(TASKS, 1.0))


def test_a_profile_prices_a_schedule():
    profile = MachineProfile(machine(8, 4), link(1e-5, 1e-10), link(3e-5, 8e-10), LinearCost(5e-5, 1e-12), num_experts=4)
    costs = profile.chunk_costs({"all_to_all": 1e7, "all_gather": 2e7, "reduce_scatter": 3e7, "experts": 1e10})
    np.testing.assert_allclose(costs.chunk(2), [3e-5 + 4e-3, 1e-5 + 1e-3, 1e-5 + 1.5e-3, 5e-5 + 5e-3])
    assert makespan(costs, best_degree(costs)) < makespan(costs, 1)


def test_saved_profiles_are_read_back_and_damaged_ones_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MOETRAIN_CACHE", str(tmp_path))
    profile = MachineProfile(machine(2, 2), link(1e-5, 1e-9), {}, LinearCost(0.0, 1e-12, 0.5, ((1.0, 2.0), (3.0, 4.0))), num_experts=4)
    file = profile.save()
    assert file == tmp_path / "profiles" / "test_r_cpu_1_ghz-gloo-1x2-float32.json" and load_profile(file) == profile
    with pytest.raises(ConfigError, match="moetrain bench profile"):
        load_profile(tmp_path / "missing.json")
    plain = json.loads(file.read_text())
    plain["experts"]["beta"] = "fast"
    file.write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match=r"experts\.beta"):
        load_profile(file)
    file.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile(file)


def measured(rank, world_size, **arguments):
    return measure(Sweep(**TINY), torch.device("cpu"), dist.group.WORLD, **arguments)


def test_all_ranks_measure_both_kinds_of_links_and_agree():
    profiles = run_distributed(measured, 4, ranks_per_node=2)
    first = profiles[0]
    assert all(profile == first for profile in profiles)
    assert first.intra.keys() == first.inter.keys() == COLLECTIVES.keys()
    assert (first.machine.num_nodes, first.machine.backend) == (2, "gloo")
    assert [n for n, _ in first.intra["all_to_all"].samples] == [256.0, 1024.0, 4096.0]
    assert [n for n, _ in first.experts.samples] == [rows * 2 * 6 * 8 * 8 for rows in (1, 3, 8)]
    for cost in (*first.intra.values(), *first.inter.values(), first.experts):
        assert all(0 < t < 10 for _, t in cost.samples) and cost.alpha >= 0 and cost.beta >= 0


def test_nodes_of_one_rank_have_no_inner_links():
    profile = run_distributed(measured, 2, ranks_per_node=1)[0]
    assert profile.intra == {} and profile.inter.keys() == COLLECTIVES.keys()


def test_nodes_must_divide_the_ranks():
    with pytest.raises(ConfigError, match="ranks_per_node = 2: must divide the 1 ranks"):
        measure(Sweep(**TINY), torch.device("cpu"), ranks_per_node=2)


def test_sizes_that_are_not_chosen_suit_the_device():
    chosen = Sweep(hidden_size=8, dtype="float32")
    assert (chosen.on("cuda").hidden_size, chosen.on("cuda").dtype) == (8, "float32")
    assert Sweep().on("cpu").dtype == "float32" and Sweep().on("cuda").dtype == "bfloat16"
    assert Sweep().on("cuda").expert_width > Sweep().on("cpu").expert_width > 0


def test_a_smallest_size_must_lie_below_the_largest():
    assert not list(Sweep(min_rows=513).problems("")), "8192 rows are the default on a GPU"
    assert [str(p) for p in Sweep(min_rows=513, max_rows=512).problems("bench")] == ["bench.min_rows = 513: must be < bench.max_rows (512)"]
    with pytest.raises(ConfigError, match=r"min_rows = 513: must be < max_rows \(512\)"):
        measure(Sweep(min_rows=513), torch.device("cpu"))
