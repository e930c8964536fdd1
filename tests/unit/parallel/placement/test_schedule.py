"""The chunked schedule: its closed form against an event simulation, and what the best degree promises."""

from itertools import pairwise

import numpy as np
import pytest

from moetrain.parallel.placement.schedule import TASKS, ChunkCosts, best_degree, case_times, idle_window, makespan


def random_costs(generator, *shape):
    """Costs whose relative sizes span two orders of magnitude, so that every stream is the bottleneck in some case."""
    draw = lambda: 10.0 ** generator.uniform(-1, 1, (*shape, 4))  # noqa: E731
    return ChunkCosts(alpha=0.1 * draw(), beta=draw(), n=draw())


def simulate(times, r, gar):
    """Length of the schedule by running its tasks: a task starts when its stream and the task before it are done.

    times: seconds of AlltoAll, AllGather, ReduceScatter, experts for one chunk.
    """
    a, g, s, e = times
    free = dict.fromkeys(("inter", "intra", "compute"), 0.0)

    def run(stream, seconds, ready):
        free[stream] = max(free[stream], ready) + seconds
        return free[stream]

    dispatched = [run("inter", a, 0.0) for _ in range(r)]
    run("inter", gar, 0.0)
    gathered = [run("intra", g, ready) for ready in dispatched]
    computed = [run("compute", e, ready) for ready in gathered]
    scattered = [run("intra", s, ready) for ready in computed]
    return [run("inter", a, ready) for ready in scattered][-1]


@pytest.mark.parametrize("seed", range(4))
def test_the_closed_form_is_the_length_of_the_simulated_schedule(seed):
    generator = np.random.default_rng(seed)
    costs = random_costs(generator, 200)
    degrees = generator.integers(1, 17, 200)
    gar = generator.choice([0.0, 1.0, 20.0], 200) * generator.uniform(size=200)
    simulated = [simulate(times, int(r), t) for times, r, t in zip(costs.chunk(degrees), degrees, gar, strict=True)]
    np.testing.assert_allclose(makespan(costs, degrees, gar), simulated, rtol=1e-12)


def test_one_chunk_is_a_chain():
    costs = random_costs(np.random.default_rng(0), 50)
    a, g, s, e = costs.chunk(1).T
    np.testing.assert_allclose(makespan(costs, 1), 2 * a + g + s + e)


def test_the_best_degree_is_the_smallest_with_the_least_makespan():
    costs = random_costs(np.random.default_rng(1), 100)
    best = best_degree(costs)
    times = np.stack([makespan(costs, r) for r in range(1, 17)], axis=-1)
    assert len(set(best.tolist())) > 4
    for row, r in zip(times, best, strict=True):
        assert row[r - 1] == row.min() and (row[: r - 1] > row[r - 1]).all()
    free = ChunkCosts(alpha=np.zeros(4), beta=np.zeros(4), n=np.zeros(4))
    assert best_degree(free) == 1


def test_start_up_costs_limit_the_degree():
    work = {"beta": np.ones(4), "n": np.ones(4)}
    degrees = [int(best_degree(ChunkCosts(alpha=np.full(4, alpha), **work))) for alpha in (1e-6, 0.01, 0.05, 10.0)]
    assert degrees == sorted(degrees, reverse=True) and degrees[0] == 16 and degrees[-1] == 1


def test_a_gradient_reduction_is_free_within_the_idle_window_and_costs_its_length_beyond():
    costs = random_costs(np.random.default_rng(2), 100)
    degrees = np.random.default_rng(3).integers(1, 17, 100)
    window, base = idle_window(costs, degrees), makespan(costs, degrees)
    assert (window > 0).all()
    np.testing.assert_allclose(makespan(costs, degrees, window), base)
    np.testing.assert_allclose(makespan(costs, degrees, window + 1.0), base + 1.0)
    growing = [makespan(costs, degrees, gar) for gar in np.linspace(0, 10, 20)]
    assert all((later >= earlier).all() for earlier, later in pairwise(growing))


def test_the_papers_cases_are_lower_bounds_and_exact_for_equal_collectives_within_a_node():
    costs = random_costs(np.random.default_rng(4), 400)
    bound = case_times(costs, 4).max(axis=-1)
    assert (makespan(costs, 4) >= bound - 1e-12).all() and not np.allclose(makespan(costs, 4), bound)
    ag, rs = TASKS.index("all_gather"), TASKS.index("reduce_scatter")
    for values in (costs.alpha, costs.beta, costs.n):
        values[:, rs] = values[:, ag]
    assert np.isclose(makespan(costs, 4), case_times(costs, 4).max(axis=-1)).mean() > 0.9


def test_backward_doubles_expert_computation_alone():
    costs = random_costs(np.random.default_rng(5))
    np.testing.assert_allclose(costs.backward().chunk(3) / costs.chunk(3), [1, 1, 1, 2])
