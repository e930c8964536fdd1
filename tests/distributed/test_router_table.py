"""Every router computes under every layout and capacity policy what one process computes, in float64.

The cells are a part of the table in ``moetrain.testing.router_table``; ``scripts/check_routers.py`` runs all of it.
"""

import itertools

import pytest

from moetrain.registry import components
from moetrain.testing.router_table import LAYOUTS, RouterCell, columns, fitting_losses, outcomes, rows, selection
from moetrain.testing.scenarios import compare

RANKS, STEPS = 2, 3
REFUSED = {"expert_choice": "router.allow_future=true"}
"""Rows that the configuration refuses as they are, and what the reason must name."""


@pytest.mark.parametrize("row", rows())
def test_no_layout_or_limit_changes_what_a_router_computes(row):
    chosen = selection(RANKS, STEPS)[row]
    if row in REFUSED:
        problem = RouterCell(row, next(iter(columns())), "single", RANKS, STEPS, ()).problem()
        assert not chosen and problem is not None and REFUSED[row] in problem
        return
    assert len(chosen) == 3
    for cell, actual, expected in outcomes(chosen):
        print(cell)  # shown if it fails
        compare(actual, expected)


def test_everything_registered_is_in_the_table():
    assert {row.split()[0] for row in rows()} >= set(components("router"))
    assert set(columns()) >= set(components("capacity"))
    chosen = [cell for of_row in selection(RANKS, STEPS).values() for cell in of_row]
    assert {(cell.layout, cell.column) for cell in chosen} == set(itertools.product(LAYOUTS, columns()))
    assert {name for cell in chosen for name in cell.losses} == set(components("loss"))
    assert [row for row in rows() if not fitting_losses(row)] == ["expert_choice", "hash"]


def test_a_policy_without_meaning_is_refused_with_the_reason():
    problem = RouterCell("topk", "slots_by_kind", "ep", RANKS, STEPS, ()).problem()
    assert problem is not None and "capacity" in problem and "needs a router with zero_experts" in problem
