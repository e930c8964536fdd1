"""Reports of scripts/experiments: verdicts and tables follow from the results, and the arms are those of the claims."""

import json
import math
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[3] / "scripts" / "experiments"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def line(arm, seed, *overrides, **figures):
    figures = {"loss": 2.0, "noisy loss": 2.5, "active": 2.0, "entropy": 1.0, "loss, k=8": 3.0, **figures}
    return json.dumps({"arm": arm, "seed": seed, "overrides": ["a=1", f"train.seed={seed}", *overrides], "figures": figures})


def results(**losses):
    """Lines of arms with these losses by seed."""
    return [
        line(arm.replace("_", "-"), seed, f"arm={arm}", loss=loss) for arm, values in losses.items() for seed, loss in enumerate(values)
    ]


def test_difference_of_two_arms_is_compared_with_the_pooled_standard_error():
    from routing_report import lower, read

    runs, _ = read(results(a=[1.0, 2.0, 3.0], b=[2.0, 4.0, 6.0]))
    difference, error = lower("", "a", "b").difference(runs)
    assert difference == 2.0
    assert error == pytest.approx(math.sqrt((1 + 4) / 2) * math.sqrt(2 / 3))


def test_figures_of_the_same_runs_are_compared_by_seed():
    from routing_report import Claim, Side, read

    runs, _ = read([line("a", seed, x=x, y=x + d) for seed, (x, d) in enumerate([(1.0, 1.0), (5.0, 2.0), (9.0, 3.0)])])
    difference, error = Claim("", Side("a", "x"), Side("a", "y")).difference(runs)
    assert (difference, error) == (2.0, pytest.approx(1 / math.sqrt(3)))
    difference, _ = Claim("", Side("a", "x"), 2.0).difference(runs)
    assert difference == -3.0


@pytest.mark.parametrize(
    "difference, expected", [(2.1, "**appeared**"), (1.9, "did not appear"), (-1.9, "did not appear"), (-2.1, "the opposite did")]
)
def test_verdicts(difference, expected):
    from routing_report import verdict

    assert verdict(difference, 1.0).endswith(expected)


def test_arms_with_other_seeds_are_not_compared():
    from routing_report import lower, read

    runs, _ = read(results(a=[1.0, 2.0, 3.0], b=[2.0, 4.0]))
    with pytest.raises(ValueError, match=r"a has seeds \[0, 1, 2\], b \[0, 1\]"):
        lower("", "a", "b").difference(runs)


def test_report_has_verdicts_figures_commands_and_what_was_not_run():
    from routing_report import report

    text = report(results(RMoE=[2.0, 2.1, 2.2], **{"top_2": [2.5, 2.6, 2.7], "THOR": [1.0]}))
    (row,) = (each for each in text.splitlines() if "RMoE, loss" in each and "top-2, loss" in each)
    assert "2.1 ± 0.1" in row and "2.6 ± 0.1" in row and "0.5 ± 0.16" in row and row.endswith("| **appeared** |")
    assert "- RMoE: `arm=RMoE`" in text and "moetrain train a=1 train.seed=SEED" in text
    assert "Not run: lower loss than Switch" in text and "- THOR:" not in text


def test_claims_are_about_arms_that_exist_and_their_overrides_are_valid():
    from routing import ARMS, BASE, STEPS
    from routing_report import CLAIMS

    from moetrain.launch.compose import build_config, compose

    assert {arm for claims in CLAIMS.values() for claim in claims for arm in claim.arms()} <= ARMS.keys()
    for name in ("EvoMoE", "no balance", "MoE++"):
        build_config(compose(*BASE, f"train.steps={STEPS}", *ARMS[name].overrides))


def test_results_of_other_settings_are_left_out():
    from routing import all_overrides, present

    def entry(arm, seed, overrides):
        return json.dumps({"arm": arm, "seed": seed, "overrides": overrides})

    late, early = (entry("top-p", seed, all_overrides("top-p", seed, 9)) for seed in (1, 0))
    other = entry("top-2", 0, all_overrides("top-2", 0, 8))
    assert present([late, other, early], 9) == [early, late] and present([other], 8) == [other]


def test_the_committed_report_is_made_from_the_committed_results():
    import estimation_rate
    from routing import REPORT, RESULTS, STEPS, present
    from routing_report import report

    assert REPORT.read_text() == report(present(RESULTS.read_text().splitlines(), STEPS))
    rates = estimation_rate.RESULTS.read_text().splitlines()
    assert (estimation_rate.DOCS / "estimation_rate.md").read_text() == estimation_rate.report(rates)


def test_slopes_and_rules_of_the_estimation_rate():
    import estimation_rate

    def lines(linear, other):
        rates = {"linear": linear, "sigmoid": other, "tanh": -0.5}
        sizes = (1_000, 10_000, 100_000)
        return [
            json.dumps({"gate": gate, "n": n, "fits": [dict.fromkeys(estimation_rate.ERRORS, f * n**rate) for f in (1.0, 2.0, 9.0)]})
            for gate, rate in rates.items()
            for n in sizes
        ]

    found = estimation_rate.medians(lines(0.0, -0.5))
    assert found["linear"][1_000]["tau"] == 2.0
    assert estimation_rate.slopes(found)["sigmoid"]["experts"] == pytest.approx(-0.5)
    assert list(estimation_rate.acceptance(found).values()) == [True, True, True]
    assert list(estimation_rate.acceptance(estimation_rate.medians(lines(-0.5, -0.3))).values()) == [False, True, False]


@pytest.mark.parametrize("activation", ["linear", "sigmoid", "tanh"])
def test_the_mixture_is_a_density_and_only_the_linear_gate_has_a_flat_direction(activation):
    import estimation_rate

    mixture, theta = estimation_rate.Mixture(activation), estimation_rate.TRUTH
    assert mixture.hellinger(theta) < 1e-6
    scaled = theta.clone()
    scaled[:2] *= 1.5
    scaled[2] += math.log(1.5)
    x = torch.linspace(-3, 3, 31, dtype=torch.float64)
    change = float((mixture.gates(scaled, x) - mixture.gates(theta, x)).exp().sub(1).abs().max())
    assert change < 1e-12 if activation == "linear" else change > 1e-2
