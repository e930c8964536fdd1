from __future__ import annotations

import dataclasses
import itertools
import time

import pytest
import torch
from torch import nn

from moetrain.testing.layer_bench import (
    PRECISIONS,
    AutogradLayer,
    CopyLimit,
    DenseLimit,
    LayerCase,
    OwnLayer,
    Seconds,
    cast_inputs,
    choose_experts,
    expected_results,
    interleave,
    make_inputs,
    peak_bytes,
    shared_rounds,
    time_step,
    worst_error,
)

CPU = torch.device("cpu")
CASE = LayerCase(tokens=48, hidden=32, width=24, experts=6, top_k=2)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("routing", ["balanced", "zipf:1.2"])
def test_own_layer_computes_what_the_reference_does(precision, routing):
    case = dataclasses.replace(CASE, precision=precision, routing=routing)
    inputs = make_inputs(case)
    layer = OwnLayer.ready(case, cast_inputs(inputs, case, CPU))
    expected = expected_results(inputs, case.top_k)
    for _ in range(2):  # prepare() has to forget the first step's gradients
        layer.prepare()
        layer.step()
        assert worst_error(layer.results(), expected, case)[0] <= 1
    assert layer.results()["gate"].dtype == case.weight_dtype
    assert layer.results()["y"].dtype == case.dtype


@pytest.mark.parametrize("name", ["y", "x", "router", "gate", "up", "down"])
def test_a_wrong_entry_of_any_result_is_found(name):
    expected = expected_results(make_inputs(CASE), CASE.top_k)
    wrong = {key: t.clone() for key, t in expected.items()}
    assert worst_error(wrong, expected, CASE)[0] == 0
    wrong[name].view(-1)[-1] += 2e-5 * expected[name].abs().max()
    error, where = worst_error(wrong, expected, CASE)
    assert where == name and error == pytest.approx(2)
    wrong[name].view(-1)[-1] = torch.nan
    assert worst_error(wrong, expected, CASE) == (torch.inf, name)


def test_balanced_loads_differ_by_one_row_and_zipf_loads_fall_as_told():
    balanced = choose_experts(LayerCase(tokens=1000, hidden=64, width=8, experts=48, top_k=5))
    loads = balanced.flatten().bincount(minlength=48)
    assert loads.max() - loads.min() <= 1
    zipf = choose_experts(LayerCase(tokens=20000, hidden=64, width=8, experts=16, top_k=1, routing="zipf:1.2"))
    loads = zipf.flatten().bincount(minlength=16).sort(descending=True).values.double()
    probabilities = torch.arange(1, 17, dtype=torch.float64) ** -1.2
    torch.testing.assert_close(loads / 20000, probabilities / probabilities.sum(), atol=0.01, rtol=0)
    for chosen in (balanced, choose_experts(dataclasses.replace(CASE, routing="zipf:1.2"))):
        ordered = chosen.sort(1).values
        assert (ordered[:, 1:] > ordered[:, :-1]).all()


def test_low_precision_copies_are_made_anew_in_each_step():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((4,), 1.0))
            self.seen = None

        def forward(self, x):
            self.seen = self.weight
            return x * self.weight

    module = Scale()
    x = torch.arange(8.0).view(2, 4).bfloat16()
    layer = AutogradLayer(module, x, torch.ones_like(x), lambda: {"weight": module.weight.grad}, low_precision=True)
    for factor in (1.0, 2.0):
        with torch.no_grad():
            module.weight.fill_(factor)
        layer.prepare()
        layer.step()
        assert module.seen.dtype == torch.bfloat16
        assert module.weight.grad.dtype == torch.float32
        torch.testing.assert_close(module.weight.grad, x.float().sum(0))
        torch.testing.assert_close(layer.results()["y"], x * factor)


def test_dense_limit_counts_nine_products_per_expert_on_balanced_rows(monkeypatch):
    products = []
    real = torch.mm

    def counting(a, b, *, out):
        products.append(a.shape[0] * a.shape[1] * b.shape[1])
        return real(a, b, out=out)

    limit = DenseLimit(CASE, CPU)
    monkeypatch.setattr(torch, "mm", counting)
    limit.step()
    assert len(products) == 9 * CASE.experts
    assert sum(products) == 9 * CASE.tokens * CASE.top_k * CASE.hidden * CASE.width


def test_copy_limit_moves_the_rows_of_both_gathers_and_both_sums():
    limit = CopyLimit(CASE, CPU)
    limit.step()
    rows = CASE.tokens * CASE.top_k
    assert 2 * limit.source.numel() == 2 * (2 * rows + rows + CASE.tokens) * CASE.hidden
    assert torch.equal(limit.source, limit.target)


def test_each_step_follows_the_limit_and_rounds_start_with_another_system():
    calls = []
    clock = itertools.count(1)

    def call(name):
        def run():
            calls.append(name)
            return Seconds(float(next(clock)), 1.0)

        return run

    pairs = interleave({name: call(name) for name in "abc"}, call("limit"), 4)
    assert "".join(name for name in calls if name != "limit") == "abc" + "bca" + "cab" + "abc"
    assert calls[::2] == ["limit"] * 12
    assert pairs["a"][0].wall == 2.0  # 2 s after a limit of 1 s
    assert all(pair.own.wall == pair.limit.wall + 1 for own in pairs.values() for pair in own)


def test_a_slow_system_is_left_out_after_three_rounds():
    systems = {"slow": lambda: Seconds(5.0, 5.0), "fast": lambda: Seconds(1.5, 1.5)}
    pairs = interleave(systems, lambda: Seconds(1.0, 1.0), 5, slow=3.0)
    assert len(pairs["slow"]) == 3 and len(pairs["fast"]) == 5
    assert [own.cpu / other.cpu for own, other in shared_rounds(pairs["fast"], pairs["slow"])] == [0.3] * 3


def test_time_step_sees_work_and_waiting_apart():
    busy = time_step(lambda: [i * i for i in range(500_000)] and None, CPU)
    idle = time_step(lambda: time.sleep(0.1), CPU)
    assert busy.wall > 0.9 * busy.cpu > 0  # another process may have had the processor meanwhile
    assert idle.wall >= 0.1 and idle.cpu < busy.cpu


def test_peak_memory_holds_output_and_gradients_but_not_the_weights():
    case = LayerCase(tokens=256, hidden=64, width=64, experts=8, top_k=2)
    layer = OwnLayer.ready(case, cast_inputs(make_inputs(case), case, CPU))
    layer.prepare()
    layer.step()
    results = sum(t.numel() * t.element_size() for t in layer.results().values())
    rows = case.tokens * case.top_k
    hidden = rows * 2 * case.width * 4
    assert results < peak_bytes(layer, CPU) < results + 12 * hidden


@pytest.mark.parametrize(
    "change, message",
    [
        ({"precision": "float16"}, "float16"),
        ({"routing": "uniform"}, "uniform"),
        ({"top_k": 6}, "K < E"),
        ({"hidden": 4}, "E <= D"),
    ],
)
def test_cases_that_are_no_layer_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CASE, **change)
