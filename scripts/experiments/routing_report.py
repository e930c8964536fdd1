"""Claims of the routing papers, tested on the results of routing.py, as docs/experiments/README.md.

A claim is that one figure is lower than another. It appeared if the difference of the means over seeds is above twice its
standard error: s sqrt(2 / n) with the pooled deviation s of two arms; of the differences by seed if both figures are of the
same runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

Runs = dict[str, dict[int, dict[str, float]]]
"""Arm -> seed -> figures."""


@dataclass(frozen=True)
class Side:
    """A figure of an arm."""

    arm: str
    figure: str = "loss"

    def values(self, runs: Runs) -> list[float]:
        """By seed, seeds in order."""
        return [figures[self.figure] for _, figures in sorted(runs[self.arm].items())]


@dataclass(frozen=True)
class Claim:
    """low's figure is lower than high's; a number is a constant."""

    words: str
    low: Side | float
    high: Side | float

    def arms(self) -> set[str]:
        return {side.arm for side in (self.low, self.high) if isinstance(side, Side)}

    def difference(self, runs: Runs) -> tuple[float, float]:
        """high - low, and its standard error."""
        if len(self.arms()) == 1:
            (arm,) = self.arms()
            low, high = (side.values(runs) if isinstance(side, Side) else [side] * len(runs[arm]) for side in (self.low, self.high))
            differences = [b - a for a, b in zip(low, high, strict=True)]
            return mean(differences), stdev(differences) / math.sqrt(len(differences))
        assert isinstance(self.low, Side) and isinstance(self.high, Side)
        seeds = [sorted(runs[side.arm]) for side in (self.low, self.high)]
        if seeds[0] != seeds[1]:
            raise ValueError(f"{self.low.arm} has seeds {seeds[0]}, {self.high.arm} {seeds[1]}")
        low, high = self.low.values(runs), self.high.values(runs)
        pooled = math.sqrt((stdev(low) ** 2 + stdev(high) ** 2) / 2)
        return mean(high) - mean(low), pooled * math.sqrt(2 / len(low))


def verdict(difference: float, error: float) -> str:
    """difference: in the claimed direction."""
    if difference > 2 * error:
        return "**appeared**"
    return "did not appear: the opposite did" if difference < -2 * error else "did not appear"


def lower(words: str, low: str, high: str, figure: str = "loss") -> Claim:
    """A claim on the same figure of two arms."""
    return Claim(words, Side(low, figure), Side(high, figure))


CLAIMS: dict[str, list[Claim]] = {
    "Dynamic routing (top-p, 2403.07652)": [
        lower("lower loss than top-2", "top-p", "top-2"),
        Claim("fewer than 2 experts per token", Side("top-p", "active"), 2.0),
        Claim("experts per token fall in training", Side("top-p", "train active, end"), Side("top-p", "train active, start")),
        lower("the entropy loss is what makes them fall", "top-p", "top-p, no entropy loss", "active"),
        Claim("the last layer uses fewer than the first", Side("top-p", "active, last layer"), Side("top-p", "active, first layer")),
    ],
    "AdaMoE (2406.13233)": [
        lower("lower loss than top-2", "AdaMoE", "top-2"),
        Claim("fewer than 2 experts per token", Side("AdaMoE", "active"), 2.0),
        Claim("tokens differ in their number of experts (deviation above 0.1)", 0.1, Side("AdaMoE", "active, deviation")),
    ],
    "MoE++ (2410.07348)": [
        lower("lower loss than top-2", "MoE++", "top-2"),
        Claim("fewer than 2 FFN experts per token", Side("MoE++", "active"), 2.0),
    ],
    "RMoE (2408.06793)": [
        lower("lower loss than top-2", "RMoE", "top-2"),
        lower("the carried state is what helps: lower loss than with a state of zero in every layer", "RMoE", "RMoE, restarted"),
        lower("higher entropy of the router than top-2", "top-2", "RMoE", "entropy"),
    ],
    "SMoE-Dropout (2303.01610)": [
        Claim("trained with more and more experts: 2 experts are better than 1", Side("SMoE-Dropout", "loss, k=2"),
              Side("SMoE-Dropout", "loss, k=1")),
        Claim("4 are better than 2", Side("SMoE-Dropout", "loss, k=4"), Side("SMoE-Dropout", "loss, k=2")),
        Claim("8 are better than 4", Side("SMoE-Dropout"), Side("SMoE-Dropout", "loss, k=4")),
        Claim("a learned top-2 gets worse with 8", Side("top-2"), Side("top-2", "loss, k=8")),
        lower("with 8 better than learned top-2", "SMoE-Dropout", "top-2"),
    ],
    "EvoMoE (2112.14397)": [
        lower("lower loss than Switch", "EvoMoE", "Switch"),
        lower("experts made from one are better than the same gate from scratch", "EvoMoE", "dense-to-sparse"),
        Claim("experts per token fall in training", Side("EvoMoE", "train active, end"), Side("EvoMoE", "train active, start")),
    ],
    "THOR (2110.04260)": [
        lower("lower loss than Switch with as many experts", "THOR", "Switch, 2 experts"),
        lower("the consistency loss lowers the loss", "THOR", "THOR, alpha 0"),
        lower("predictions of two draws of experts disagree less with it", "THOR", "THOR, alpha 0", "disagreement"),
    ],
    "MomentumSMoE (2410.14574)": [
        lower("lower loss than top-2", "MomentumSMoE", "top-2"),
        lower("lower loss than top-2 on noisy input", "MomentumSMoE", "top-2", "noisy loss"),
        lower("the noise costs less than with top-2", "MomentumSMoE", "top-2", "cost of noise"),
        lower("AdamSMoE: lower loss than top-2", "AdamSMoE", "top-2"),
        lower("AdamSMoE: lower loss than top-2 on noisy input", "AdamSMoE", "top-2", "noisy loss"),
    ],
    "COMET (2306.02824)": [
        lower("lower loss than top-2", "COMET", "top-2"),
        lower("lower loss than DSelect-k", "COMET", "DSelect-k"),
        lower("the search over permutations (COMET+) lowers the loss", "COMET+", "COMET"),
        Claim("experts per token fall in training", Side("COMET", "train active, end"), Side("COMET", "train active, start")),
    ],
    "Balance without a loss (2408.15664), sigmoid top-2": [
        lower("lower loss than with a balance loss", "aux-free", "aux loss"),
        lower("the bias evens the load: fullest expert over the mean, against no balancing", "aux-free", "no balance", "max/mean load"),
        lower("the bias evens the load as well as the loss does, or better", "aux-free", "aux loss", "max/mean load"),
    ],
}  # fmt: skip

COLUMNS = ("loss", "noisy loss", "active", "active, deviation", "MFLOP", "train active, start", "train active, end", "train MFLOP",
           "entropy", "max/mean load")  # fmt: skip


def read(lines: Iterable[str]) -> tuple[Runs, dict[str, list[str]]]:
    """Figures, and the overrides of each arm without its seed, from the lines of a result file."""
    runs: Runs = {}
    overrides: dict[str, list[str]] = {}
    for line in lines:
        entry = json.loads(line)
        figures = entry["figures"]
        runs.setdefault(entry["arm"], {})[entry["seed"]] = {**figures, "cost of noise": figures["noisy loss"] - figures["loss"]}
        overrides[entry["arm"]] = [each for each in entry["overrides"] if not each.startswith("train.seed=")]
    return runs, overrides


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; four digits."""
    return f"{mean(values):.4g} ± {stdev(values):.2g}" if stdev(values) else f"{mean(values):.4g}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, numbers to the right."""
    ruler = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [columns, ruler, *rows])


def claim_row(claim: Claim, runs: Runs) -> list[str]:
    difference, error = claim.difference(runs)
    sides = []
    for side in (claim.low, claim.high):
        sides.append(f"{side.arm}, {side.figure}: {spread(side.values(runs))}" if isinstance(side, Side) else f"{side:g}")
    return [claim.words, *sides, f"{difference:.3g} ± {2 * error:.2g}", verdict(difference, error)]


def report(lines: Iterable[str]) -> str:
    """The text of README.md. Claims about arms that have fewer than 2 seeds are listed as not run."""
    runs, overrides = read(lines)
    runs = {arm: seeds for arm, seeds in runs.items() if len(seeds) > 1}
    seeds = sorted({seed for arm in runs.values() for seed in arm})
    everyone: list[Any] = [set(overrides[arm]) for arm in runs]
    first = next(iter(runs))
    shared = [each for each in overrides[first] if all(each in other for other in everyone)]
    text = [INTRODUCTION.format(seeds=", ".join(map(str, seeds)), shared=" ".join(shared))]
    for method, claims in CLAIMS.items():
        tested = [claim for claim in claims if claim.arms() <= runs.keys()]
        missing = [claim.words for claim in claims if claim not in tested]
        text += ["", f"## {method}", ""]
        if tested:
            columns = ["claim", "claimed to be lower", "than", "difference ± 2 SE", "verdict"]
            text.append(table(columns, [claim_row(claim, runs) for claim in tested]))
        text += [f"\nNot run: {words}." for words in missing]
    text += ["", "## All arms", "", FIGURES, ""]
    rows = []
    for arm, by_seed in runs.items():
        figures = [[run[column] for run in by_seed.values()] if column in next(iter(by_seed.values())) else [] for column in COLUMNS]
        rows.append([arm, *(spread(values) if values else "" for values in figures)])
    text.append(table(["arm", *COLUMNS], rows))
    text += ["", "Loss by experts per token at evaluation; each arm's own number is the column `loss` above.", ""]
    counts = sorted({name for by_seed in runs.values() for run in by_seed.values() for name in run if name.startswith("loss, k=")})
    curves = {arm: by_seed for arm, by_seed in runs.items() if any(name in next(iter(by_seed.values())) for name in counts)}
    text.append(
        table(
            ["arm", *counts],
            [
                [arm, *(spread(Side(arm, n).values(runs)) if n in next(iter(s.values())) else "own" for n in counts)]
                for arm, s in curves.items()
            ],
        )
    )
    text += ["", "Overrides of each arm beyond the shared ones:", ""]
    text += [f"- {arm}: `{' '.join(each for each in overrides[arm] if each not in shared)}`" for arm in runs]
    return "\n".join(text) + "\n"


INTRODUCTION = """\
# Small experiments: does what the papers claim appear?

Written by `OMP_NUM_THREADS=1 python scripts/experiments/routing.py` from `scripts/experiments/results/routing.jsonl`. The rate at
which gates are estimated from data is in [estimation_rate.md](estimation_rate.md).

Every arm is a run of `moetrain train {shared} train.seed=SEED` with the overrides at the end, seeds {seeds}:
a byte-level language model with 3 MoE layers after minutes of one core. Such a model says little about large ones. All arms take
the same steps on the same data; what a token costs differs where the method says so, see `active` and `MFLOP` below.

Losses are in nats per byte over the same 256 held-out sequences. Figures are mean ± standard deviation over seeds. **Rule**: a claim
appeared if the difference of the means, in the claimed direction, is above twice its standard error (two arms: pooled
deviation times sqrt(2 / n); two figures of the same runs: of the differences by seed). With 3 seeds a claim without any
truth passes in about 6 (two arms) to 9 (same runs) of 100 cases, and small effects stay hidden."""

FIGURES = """\
`noisy loss`: a tenth of the input bytes replaced at random, targets kept. `active`: experts that compute, per token and MoE layer, at
evaluation; `active, deviation`: over tokens. `MFLOP`: of a forward pass per token; `train MFLOP`: of forward and backward per
token of data, mean over training. `train active`: choices of experts per token in the first steps with experts and in
the last. `entropy`: of the router. `max/mean load`: choices of the fullest expert over the mean, at evaluation."""
