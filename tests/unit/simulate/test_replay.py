"""Replays: nothing is known before its step, and figures equal those counted by hand."""

import numpy as np
import pytest

from moetrain.parallel.layouts import FSSDPSettings
from moetrain.parallel.placement.cost import layer_time
from moetrain.parallel.placement.plan import PlacementPlan
from moetrain.parallel.placement.planners import even_sharding
from moetrain.parallel.scheduling import layer_cost
from moetrain.simulate.replay import Placements, busiest_over_mean, replay
from moetrain.simulate.strategies import PeriodicEPLB, shadowing, split_equally, strategies
from moetrain.simulate.traces import synthetic_trace

RANKS, EXPERTS, STEPS = 4, 8, 9
TOKENS, TOP_K = 500, 2
SETTINGS = FSSDPSettings(window=3, overlap_degree=2)
ALL = strategies(SETTINGS, reshard_every=4)
NAMES = [strategy.name for strategy in ALL]


@pytest.fixture
def counts():
    return synthetic_trace("zipf:1.2", steps=STEPS, layers=2, ranks=RANKS, experts=EXPERTS, tokens=TOKENS, top_k=TOP_K).counts


@pytest.fixture
def run(sizes, cluster, counts):
    """Replay the strategy of this name."""

    def run(name, counts=counts, warm_up=3, settings=SETTINGS):
        (strategy,) = [each for each in strategies(settings, reshard_every=4) if each.name == name]
        return replay(strategy, counts, sizes, costs_of(strategy, sizes, cluster), cluster, warm_up=warm_up)

    return run


def costs_of(strategy, sizes, cluster):
    return [
        layer_cost(each.experts, sizes.hidden_size, sizes.dtype, strategy.settings, mixer_flops=1e4, cluster=cluster)
        for each in sizes.layers
    ]


def test_expert_parallelism_by_hand(run, counts, sizes, cluster):
    figures = run("EP").figures
    owner = even_sharding(EXPERTS, RANKS)
    sent = counts[3:] @ np.eye(RANKS, dtype=np.int64)[owner]  # [S, L, R, R]
    other_node = cluster.node[:, None] != cluster.node
    elsewhere = ~np.eye(RANKS, dtype=bool)
    row = 4 * 16 * 2  # four all-to-alls of 16 bfloat16 values
    assert figures.tokens.inter == pytest.approx(row * (sent * other_node).sum() / 6)
    assert figures.tokens.intra == pytest.approx(row * (sent * (elsewhere & ~other_node)).sum() / 6)
    assert figures.copies_max == figures.gather.inter == figures.reduce.intra == figures.exposed_seconds == 0
    load = sent.sum(axis=2).max(axis=-1) * RANKS / (RANKS * TOKENS * TOP_K)
    assert figures.load_mean == pytest.approx(load.mean()) and figures.load_worst == pytest.approx(load.max())
    split = np.zeros((RANKS, EXPERTS, RANKS), dtype=np.int64)
    seconds = 0.0
    for layer in counts[3:].reshape(-1, RANKS, EXPERTS):
        split[:, np.arange(EXPERTS), owner] = layer
        seconds += layer_time(split, PlacementPlan.owners_only(owner, RANKS), cluster, costs_of(ALL[0], sizes, cluster)[0]).total
    assert figures.seconds == pytest.approx(seconds / 6)
    assert figures.seconds == pytest.approx(figures.all_to_all_seconds + figures.compute_seconds)


def test_zero3_moves_weights_and_no_tokens(run):
    figures = run("ZeRO-3 experts").figures
    assert figures.tokens.intra == figures.tokens.inter == 0 and figures.load_worst == 1
    assert figures.copies_mean == figures.copies_max == EXPERTS - EXPERTS // RANKS
    # every expert goes to one rank of its node and two of the other, twice since it is re-materialised; 2 bytes a value
    expert = 3 * 16 * 8 * 2
    assert (figures.gather.intra, figures.gather.inter) == (2 * 2 * EXPERTS * expert, 2 * 2 * EXPERTS * 2 * expert)
    assert (figures.reduce.intra, figures.reduce.inter) == (2 * EXPERTS * expert, 2 * EXPERTS * 2 * expert)


@pytest.mark.parametrize("strategy", [s for s in ALL if not s.after_gate], ids=lambda strategy: strategy.name)
def test_plans_do_not_know_the_loads_of_their_step(strategy, sizes, cluster, counts):
    """Whatever the router does next, the plans are the same."""
    costs = costs_of(strategy, sizes, cluster)
    first, second = (Placements(strategy, cluster, costs, EXPERTS) for _ in range(2))
    for step, now in enumerate(counts):
        mine, predicted = first.plans(now)
        theirs, _ = second.plans(now[:, :, ::-1].copy())
        for a, b in zip(mine, theirs, strict=True):
            assert np.array_equal(a.holders, b.holders) and np.array_equal(a.owner, b.owner)
            a.validate()
        window = counts[max(0, step - 3) : step]
        assert np.array_equal(predicted, np.floor(window.mean(axis=0) + 0.5) if step else np.zeros_like(now))
        first.observe(now)
        second.observe(now)


def test_shadowing_knows_them(run, counts):
    figures = run("FasterMoE").figures
    assert figures.prediction_error == 0 and figures.copies_max > 0 and figures.exposed_seconds > 0


def test_warm_up_is_replayed_but_not_counted(run, counts):
    """The first steps change the history that later ones plan with, and nothing else."""
    assert run("two-level").load.shape == (STEPS - 3, 2) and run("two-level").seconds.shape == (STEPS - 3,)
    assert np.array_equal(run("two-level", warm_up=0).load[3:], run("two-level").load)
    assert run("two-level", warm_up=0).load[0].tolist() == run("EP", warm_up=0).load[0].tolist()


def test_every_strategy_computes_all_rows_and_balances_at_least_as_the_hottest_expert(run):
    everything = {name: run(name).figures for name in NAMES}
    for name, figures in everything.items():
        assert 1 <= figures.load_mean <= figures.load_worst <= RANKS, name
        assert figures.copies_max <= (SETTINGS.extra_slots if name.startswith(("paper", "two")) else EXPERTS)
    assert everything["two-level"].load_mean < everything["EP"].load_mean
    assert everything["EPLB"].load_mean < everything["EP"].load_mean
    assert everything["two-level, re-mat."].gather.inter >= everything["two-level"].gather.inter


def test_new_owners_come_with_the_period_only(run, sizes, cluster, counts):
    (strategy,) = [s for s in ALL if s.name == "paper: Algorithms 1, 2"]
    placements = Placements(strategy, cluster, costs_of(strategy, sizes, cluster), EXPERTS)
    owners = []
    for now in counts:
        placements.observe(now)
        owners.append(placements.owners)
    changes = [step for step in range(1, STEPS) if not np.array_equal(owners[step - 1], owners[step])]
    assert changes and set(changes) <= {3, 7}  # after the fourth and the eighth step
    assert run("paper: Algorithms 1, 2").figures.experts_moved > 0
    assert run("paper: Algorithm 1").figures.experts_moved == 0


def test_eplb_keeps_its_placement_for_the_period(cluster, counts):
    planner = PeriodicEPLB(cluster, extra_slots=1, every=3, num_groups=1)
    owner = even_sharding(EXPERTS, RANKS)
    assert not planner(np.zeros((RANKS, EXPERTS), dtype=np.int64), owner).copies.any()
    plans = [planner(step[0], owner) for step in counts]
    assert all(plans[i] is plans[i - i % 3] for i in range(STEPS))
    assert plans[0] is not plans[3] and plans[3] is not plans[6]
    assert (plans[0].holders.sum(axis=0) <= EXPERTS // RANKS + 1).all()


def test_busiest_over_mean_without_rows():
    assert busiest_over_mean(np.array([[0, 0], [3, 1]])).tolist() == [1.0, 1.5]


def test_equal_parts_over_all_holders(cluster, counts):
    rng = np.random.default_rng(0)
    owner = even_sharding(EXPERTS, RANKS)
    plan = PlacementPlan(owner, (owner[:, None] == np.arange(RANKS)) | (rng.random((EXPERTS, RANKS)) < 0.5))
    split = split_equally(counts[0, 0], plan, cluster)
    assert np.array_equal(split.sum(axis=2), counts[0, 0]) and not split.sum(axis=0)[~plan.holders].any()
    per_holder = counts[0, 0][:, :, None] / plan.holders.sum(axis=1)[:, None]
    assert (np.abs(split - per_holder)[:, plan.holders] < 1).all()


def test_eplb_experts_stay_with_owners_that_keep_a_replica(cluster, counts):
    owner = np.random.default_rng(1).integers(RANKS, size=EXPERTS)
    plan = PeriodicEPLB(cluster, extra_slots=1, every=3, num_groups=1)(counts[0, 0], owner)
    plan.validate()
    stays = plan.holders[np.arange(EXPERTS), owner]
    assert stays.any() and np.array_equal(plan.owner[stays], owner[stays])
    owned = np.bincount(plan.owner, minlength=RANKS)
    for expert in np.flatnonzero(~stays):
        # whoever took it in had, before, no more experts than the other holders have now
        assert owned[plan.owner[expert]] - 1 <= owned[plan.holders[expert]].min()


def test_an_expert_is_shadowed_when_its_tokens_cost_more_than_its_transfer(sizes, cluster):
    cost = costs_of(ALL[0], sizes, cluster)[0]
    bandwidth = cluster.inter_bandwidth / 2  # of one of the two ranks of a node
    token_seconds = 3 * cost.flops_per_token / cluster.flops + 4 * cost.token_bytes / bandwidth
    enough = int(cost.expert_bytes / bandwidth / token_seconds) + 1
    plan = shadowing(SETTINGS, cluster, cost)
    for tokens, copied in ((enough - 1, False), (enough, True)):
        counts = np.zeros((RANKS, EXPERTS), dtype=np.int64)
        counts[1, 5] = tokens
        expected = [RANKS - 1 if copied and expert == 5 else 0 for expert in range(EXPERTS)]
        assert plan(counts, even_sharding(EXPERTS, RANKS)).copies.sum(axis=1).tolist() == expected
