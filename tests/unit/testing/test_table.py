"""What the table of layouts promises of itself, and that its scenarios are what they are called."""

from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from moetrain.testing.layouts import train_steps
from moetrain.testing.scenarios import SCENARIOS, compare, largest_error
from moetrain.testing.table import LAYOUTS, RANKS, Cell, cells, one_process, selection


def test_the_selection_covers_layouts_scenarios_and_ranks():
    chosen = selection()
    assert len(set(chosen)) == len(chosen) and set(chosen) <= set(cells())
    assert Counter(cell.layout for cell in chosen) == {layout: 2 for layout in LAYOUTS}
    met = defaultdict(set)
    for cell in chosen:
        met[cell.scenario].add(cell.layout)
        met[cell.ranks].add(cell.layout)
    assert all(len(met[name]) >= 2 for name in SCENARIOS)
    assert all(len(met[ranks]) >= 3 for ranks in RANKS)


def test_every_layout_runs_on_several_numbers_of_ranks():
    ranks = {name: row.ranks(SCENARIOS["deepseek"]) for name, row in LAYOUTS.items()}
    assert ranks.pop("single") == (1,)
    assert all(len(found) >= 2 for found in ranks.values()), ranks
    assert Cell("fssdp x tensor", "deepseek", 3) not in set(cells())


@pytest.mark.parametrize(("name", "expected"), [("uniform", [1 / 6] * 6), ("all_to_one", [1, 0, 0, 0, 0, 0])])
def test_drawn_loads(name, expected):
    for loads in one_process(name).selected:
        for load in loads.values():
            assert [count / sum(load) for count in load] == pytest.approx(expected, abs=0.06)


def test_zipf_loads_fall_with_the_rank_of_the_expert():
    totals = [sum(load[e] for loads in one_process("zipf").selected for load in loads.values()) for e in range(6)]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > 3 * totals[-1]


def test_a_difference_is_found_wherever_it_is():
    expected = train_steps(0, 1, replace(SCENARIOS["deepseek"], steps=1), "single")
    for field in ("outputs", "gradients", "parameters"):
        tensors = getattr(expected, field)
        key = next(iter(tensors))
        changed = replace(expected, **{field: {**tensors, key: tensors[key] + 3e-9}})
        assert 1e-10 < largest_error(changed, expected) <= 3.1e-9
        with pytest.raises(AssertionError, match=rf"{field}\["):
            compare(changed, expected)
    with pytest.raises(AssertionError, match="norms"):
        compare(replace(expected, norms=[expected.norms[0] + 1e-6]), expected)
    moved = {layer: [load[0] + 1, *load[1:]] for layer, load in expected.selected[0].items()}
    with pytest.raises(AssertionError, match="load of"):
        compare(replace(expected, selected=[moved]), expected)
