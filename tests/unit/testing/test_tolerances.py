"""assert_close: what passes, what fails, and what the message names."""

from __future__ import annotations

import math

import pytest
import torch

from moetrain.testing import assert_close


def test_layout_equality_is_per_tensor_and_relative_to_the_largest_entry() -> None:
    expected = torch.tensor([1000.0, 1e-3], dtype=torch.float64)
    assert_close(expected + 9e-8, expected, "layout")
    with pytest.raises(AssertionError, match=r"value: max\|a-b\| = 2\.0.*at \(1,\)"):
        assert_close(expected + torch.tensor([0.0, 2e-7], dtype=torch.float64), expected, "layout")


def test_the_less_precise_side_sets_the_tolerance() -> None:
    expected = torch.ones(3, dtype=torch.float64)
    assert_close(expected.float() + 5e-6, expected, "golden")
    with pytest.raises(AssertionError):
        assert_close(expected + 5e-6, expected, "golden")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_entries_must_match(bad: float) -> None:
    good, wrong = torch.tensor([1.0, 2.0]), torch.tensor([1.0, bad])
    assert_close(wrong, wrong.clone(), "exact")
    for actual, expected in ((wrong, good), (good, wrong)):
        with pytest.raises(AssertionError, match="inf"):
            assert_close(actual, expected, "layout")


def test_integers_are_compared_exactly() -> None:
    assert_close(torch.tensor([1, 2]), torch.tensor([1, 2]), "layout")
    with pytest.raises(AssertionError, match="1 of 2 entries differ"):
        assert_close(torch.tensor([1, 2]), torch.tensor([1, 3]), "layout")


def test_mappings_name_the_tensor_and_missing_keys() -> None:
    a = {"w": torch.zeros(2), "b": torch.zeros(1)}
    assert_close(a, {name: value.clone() for name, value in a.items()}, "exact")
    with pytest.raises(AssertionError, match=r"grads\[b\]"):
        assert_close(a, a | {"b": torch.ones(1)}, "layout", name="grads")
    with pytest.raises(AssertionError, match=r"missing \['c'\], unexpected \['b'\]"):
        assert_close(a, {"w": a["w"], "c": a["b"]}, "layout")


def test_shapes_must_match_and_numbers_are_float64() -> None:
    with pytest.raises(AssertionError, match=r"shape \(1, 2\), expected \(2,\)"):
        assert_close(torch.zeros(1, 2), torch.zeros(2), "layout")
    assert_close(1.0, 1.0 + 1e-11, "layout")
    with pytest.raises(AssertionError):
        assert_close(1.0, 1.0 + 1e-9, "layout")


def test_empty_tensors_are_equal() -> None:
    assert_close(torch.zeros(0, 3), torch.zeros(0, 3), "layout")
