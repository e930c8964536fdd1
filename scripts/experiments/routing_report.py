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


TOP_P = "top-p, paper's entropy loss"

CLAIMS: dict[str, list[Claim]] = {
    "Dynamic routing (top-p, 2403.07652)": [
        lower("lower loss than top-2", TOP_P, "top-2"),
        Claim("fewer than 90 % of top-2's experts", Side(TOP_P, "active"), 1.8),
        Claim("experts per token fall in training", Side(TOP_P, "train active, end"), Side(TOP_P, "train active, start")),
        Claim("the last layer uses fewer than the first", Side(TOP_P, "active, last layer"), Side(TOP_P, "active, first layer")),
        lower("the entropy loss makes them fewer", TOP_P, "top-p, no entropy loss", "active"),
        lower("so it does with 100 times its weight", "top-p", "top-p, no entropy loss", "active"),
        lower("and that has lower loss than top-1, which costs about as much", "top-p", "Switch"),
    ],
    "AdaMoE (2406.13233)": [
        lower("lower loss than top-2", "AdaMoE", "top-2"),
        Claim("fewer than 2 experts per token", Side("AdaMoE", "active"), 2.0),
        Claim("tokens differ in their number of experts (deviation above 0.1)", 0.1, Side("AdaMoE", "active, deviation")),
    ],
    "MoE++ (2410.07348)": [
        lower("lower loss than top-2", "MoE++", "top-2"),
        lower("lower loss than top-1, which costs about as much", "MoE++", "Switch"),
        lower("without capacity: lower loss than top-2", "MoE++, no capacity", "top-2"),
        lower("without capacity: lower loss than top-1", "MoE++, no capacity", "Switch"),
        Claim("fewer than 2 FFN experts per token", Side("MoE++", "active"), 2.0),
        Claim("without capacity: fewer than 2 FFN experts per token", Side("MoE++, no capacity", "active"), 2.0),
        lower("a smaller tau, 0.25 instead of 0.75, means fewer FFN experts", "MoE++, tau 0.25", "MoE++", "active"),
        lower("gating residuals lower the loss", "MoE++", "MoE++, no residual"),
        lower("and the deviation of the largest probability", "MoE++", "MoE++, no residual", "top probability, deviation"),
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
        Claim("so does a frozen random top-2", Side("frozen random top-2"), Side("frozen random top-2", "loss, k=8")),
        lower("with 8 better than learned top-2", "SMoE-Dropout", "top-2"),
        lower("with 8 better than a frozen random router with 2 all the time", "SMoE-Dropout", "frozen random top-2"),
        lower("with 8 better than a dense model with as many parameters", "SMoE-Dropout", "dense"),
    ],
    "EvoMoE (2112.14397)": [
        lower("lower loss than Switch", "EvoMoE", "Switch"),
        Claim("lower loss than Switch, if it keeps all experts above the threshold at evaluation", Side("EvoMoE", "loss, threshold"),
              Side("Switch")),
        lower("experts made from one are better than the same gate from scratch", "EvoMoE", "dense-to-sparse"),
        Claim("experts per token fall in training", Side("EvoMoE", "train active, end"), Side("EvoMoE", "train active, start")),
    ],
    "THOR (2110.04260)": [
        lower("lower loss than Switch with as many experts", "THOR", "Switch, 2 experts"),
        Claim("lower loss than Switch with as many experts, as the mean of all its experts", Side("THOR", "loss, ensemble"),
              Side("Switch, 2 experts")),
        lower("the consistency loss lowers the loss", "THOR", "THOR, alpha 0"),
        lower("predictions of two draws of experts disagree less with it", "THOR", "THOR, alpha 0", "disagreement"),
    ],
    "MomentumSMoE (2410.14574)": [
        lower("lower loss than top-2", "MomentumSMoE", "top-2"),
        lower("lower loss than top-2 on noisy input", "MomentumSMoE", "top-2", "noisy loss"),
        lower("the noise costs less than with top-2", "MomentumSMoE", "top-2", "cost of noise"),
        lower("AdamSMoE: lower loss than top-2", "AdamSMoE", "top-2"),
        lower("AdamSMoE: lower loss than top-2 on noisy input", "AdamSMoE", "top-2", "noisy loss"),
        lower("AdamSMoE with a step of 0.1: lower loss than top-2", "AdamSMoE, step 0.1", "top-2"),
        lower("AdamSMoE with a step of 0.1: lower loss than top-2 on noisy input", "AdamSMoE, step 0.1", "top-2", "noisy loss"),
    ],
    "COMET (2306.02824)": [
        lower("lower loss than top-2", "COMET", "top-2"),
        lower("lower loss than DSelect-k", "COMET", "DSelect-k"),
        lower("the search over permutations (COMET+) lowers the loss", "COMET+", "COMET"),
        lower("with a tenth of the entropy loss: lower loss than top-2", "COMET, entropy 0.005", "top-2"),
        lower("lower loss than DSelect-k", "COMET, entropy 0.005", "DSelect-k, entropy 0.005"),
        lower("the search over permutations lowers the loss", "COMET+, entropy 0.005", "COMET, entropy 0.005"),
        Claim("experts per token fall in training", Side("COMET", "train active, end"), Side("COMET", "train active, start")),
    ],
    "Balance without a loss (2408.15664), sigmoid top-2": [
        lower("lower loss than with a balance loss", "aux-free", "aux loss"),
        lower("the bias evens the load: fullest expert over the mean, against no balancing", "aux-free", "no balance", "max/mean load"),
        lower("the bias evens the load as well as the loss does, or better", "aux-free", "aux loss", "max/mean load"),
    ],
}  # fmt: skip

NOTES = {
    "Dynamic routing (top-p, 2403.07652)": "Threshold 0.4. The entropy loss has the paper's weight 1e-4, or 0.01 (`top-p`).",
    "AdaMoE (2406.13233)": "8 experts, 8 null experts, 4 choices, balance weight 0.01: 2 experts per token if choices are spread evenly.",
    "MoE++ (2410.07348)": "8 FFN experts, 2 constant, 1 copy and 1 null one, 2 choices; the recipe's capacity drops choices "
    "by sequence, also at evaluation.",
    "RMoE (2408.06793)": "State of width 32, its cell shared by all layers.",
    "SMoE-Dropout (2303.01610)": "Frozen random router, 2 experts at the start and all 8 at the end of training: it costs more than top-2.",
    "EvoMoE (2112.14397)": "A fifth of the steps trains one expert. Evaluated with the best expert alone unless the claim says otherwise; "
    "in training all experts above the threshold compute (`train MFLOP` below).",
    "THOR (2110.04260)": "2 experts drawn at random for each token. A step is two passes, twice the "
    "training cost of Switch (`train active` counts both, `train MFLOP` only in the experts).",
    "MomentumSMoE (2410.14574)": "mu 0.7, gamma 0.3 in a pre-norm model; AdamSMoE has Adam's step in the first MoE layer, whose "
    "first step of about 3.2 in every dimension is far larger than this model's residual stream; or a tenth of it.",
    "COMET (2306.02824)": "2 trees; no number of experts is prescribed. Selector entropy of weight 0.05, the recipe's, at which all "
    "tokens end at the same experts (max/mean load below), or 0.005.",
    "Balance without a loss (2408.15664), sigmoid top-2": "Bias update 0.001 per step; the balance loss is over the batch, weight 0.01.",
}
"""What differs from the papers, and what a comparison does not hold equal."""

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


def shown(side: Side | float, runs: Runs) -> str:
    return f"{side.arm}, {side.figure}: {spread(side.values(runs))}" if isinstance(side, Side) else f"{side:g}"


def claim_row(claim: Claim, runs: Runs) -> list[str]:
    """Cells of CLAIM_COLUMNS. Costs only where they are those of the losses compared."""
    difference, error = claim.difference(runs)
    costs = ""
    if len(claim.arms()) == 2 and all(isinstance(side, Side) and side.figure in ("loss", "noisy loss") for side in (claim.low, claim.high)):
        costs = " / ".join(
            f"{mean(Side(side.arm, 'MFLOP').values(runs)):.3f}" for side in (claim.low, claim.high) if isinstance(side, Side)
        )
    cells = [claim.words, shown(claim.low, runs), shown(claim.high, runs), costs]
    return [*cells, f"{difference:.3g} ± {2 * error:.2g}", verdict(difference, error)]


CLAIM_COLUMNS = ("claim", "claimed to be lower", "than", "MFLOP", "difference ± 2 SE", "verdict")


def claim_sections(runs: Runs) -> tuple[list[str], int, int]:
    """A section for each method, the number of claims tested and of those that appeared."""
    text: list[str] = []
    rows: list[list[str]] = []
    for method, claims in CLAIMS.items():
        tested = [claim_row(claim, runs) for claim in claims if claim.arms() <= runs.keys()]
        text += ["", f"## {method}", "", NOTES[method]]
        if tested:
            text += ["", table(CLAIM_COLUMNS, tested)]
        text += [f"\nNot run: {claim.words}." for claim in claims if not claim.arms() <= runs.keys()]
        rows += tested
    return text, len(rows), sum(row[-1] == verdict(1, 0) for row in rows)


def arm_section(runs: Runs) -> list[str]:
    """All figures of all arms."""
    rows = []
    for arm, by_seed in runs.items():
        figures = next(iter(by_seed.values()))
        known = [name for name in figures if "active" in figures or not name.startswith("train active")]
        rows.append([arm, *(spread(Side(arm, column).values(runs)) if column in known else "" for column in COLUMNS)])
    text = ["", "## All arms", "", FIGURES, "", table(["arm", *COLUMNS], rows), "", EVALUATIONS, ""]
    for arm, by_seed in runs.items():
        other = [name for name in next(iter(by_seed.values())) if name.startswith("loss, ")]
        if other:
            values = ", ".join(f"{name.removeprefix('loss, ')}: {spread(Side(arm, name).values(runs))}" for name in ["loss", *other])
            text.append(f"- {arm}: {values}")
    return text


def report(lines: Iterable[str]) -> str:
    """The text of README.md. Claims about arms that lack seeds are listed as not run."""
    runs, overrides = read(lines)
    seeds = sorted({seed for by_seed in runs.values() for seed in by_seed})
    runs = {arm: by_seed for arm, by_seed in runs.items() if len(by_seed) == len(seeds)}
    shared = [each for each in overrides[next(iter(runs))] if all(each in overrides[arm] for arm in runs)]
    sections, tested, appeared = claim_sections(runs)
    numbers = {"seeds": ", ".join(map(str, seeds)), "shared": " ".join(shared), "tested": tested, "appeared": appeared}
    text = [INTRODUCTION.format(**numbers), *sections, *arm_section(runs)]
    text += ["", "Overrides of each arm beyond the shared ones:", ""]
    text += [f"- {arm}: `{' '.join(each for each in overrides[arm] if each not in shared)}`" for arm in runs]
    return "\n".join(text) + "\n"


INTRODUCTION = """\
# Small experiments: does what the papers claim appear?

Written by `OMP_NUM_THREADS=1 python scripts/experiments/routing.py` from `scripts/experiments/results/routing.jsonl`. The rate at
which gates are estimated from data is in [estimation_rate.md](estimation_rate.md).

**{appeared} of {tested} claims appeared.** A claim is that one figure is lower than another; it appeared if the difference of the
means over seeds is above twice its standard error (two arms: pooled deviation times sqrt(2 / n); two figures of the same
runs: of the differences by seed). With 3 seeds a claim without any truth passes in about 6 (two arms) to 9 (same runs) of
100 cases, and small effects stay hidden. Arms named `entropy 0.005`, `no capacity`, `step 0.1` and `paper's entropy loss` were
added after the first results had been seen, and so were some claims, those at equal cost among them.

The model is a byte-level language model with 3 MoE layers on the default text, trained for ten seconds of one core: it says
little about large ones. All arms take the same steps on the same data; what a token costs differs where the method says so.
Losses are in nats per byte over the same 256 held-out sequences, figures are mean ± standard deviation over seeds, `MFLOP` is a
forward pass per token, of the arm claimed to be lower / of the other. Every arm is a run of this command, with SEED {seeds},
and its own overrides, listed at the end:

```
moetrain train {shared} train.seed=SEED
```"""

FIGURES = """\
`noisy loss`: a tenth of the input bytes replaced at random, targets kept. `active`: experts that compute, per token and MoE layer, at
evaluation; `active, deviation`: over tokens. `MFLOP`: of a forward pass per token; `train MFLOP`: of forward and backward per
token of data, mean over training. `train active`: choices of experts per token in the first steps with experts and in
the last. `entropy`: of the router. `max/mean load`: choices of the fullest expert over the mean, at evaluation."""

EVALUATIONS = """\
Losses of one trained arm under other rules of evaluation: its own (`loss`), other numbers of experts per token (`k`), all experts
above the gate's threshold as in training (`threshold`), the mean of all experts (`ensemble`):"""
