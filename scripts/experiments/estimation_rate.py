"""At what rate are the parameters of a dense-to-sparse gate estimated, with and without an activation inside its scores?

usage: python scripts/experiments/estimation_rate.py [--replicates 16] [--sizes N ...] [--report]

The claim of 2401.13875: with a linear gate the temperature and the gate's parameters cannot be told apart, so their errors
hardly fall with the sample size n, although the density is estimated as well; sigmoid or tanh inside the scores restores
a polynomial rate. Simulated data: x uniform in [-3, 3], two Gaussian experts, gate softmax((activation(w x) + b) / tau) of
moetrain's own dense_to_sparse router, its second expert pinned to zero. Maximum likelihood by L-BFGS in float64, started at
the truth with noise of fixed size. The case is the one in which the number of experts is right; the paper's rates with
too many experts are not tested.

Appends a line per gate and n to results/estimation_rate.jsonl (those there are not repeated), writes
docs/experiments/estimation_rate.md and .svg (matplotlib: pip install -e '.[bench]'). Ends with status 1 if
a rule of `acceptance` does not hold.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from moetrain.moe.routers.dense_to_sparse import DenseToSparseRouterConfig

RESULTS = Path(__file__).parent / "results" / "estimation_rate.jsonl"
DOCS = Path(__file__).parents[2] / "docs" / "experiments"
GATES = ("linear", "sigmoid", "tanh")
SIZES = (300, 1_000, 3_000, 10_000, 30_000, 100_000)
REPLICATES = 16
START_NOISE, ITERATIONS = 0.2, 300

TRUTH = torch.tensor([3.0, -0.5, math.log(0.5), -2.0, 1.5, 1.0, -1.0, math.log(0.3), math.log(0.4)], dtype=torch.float64)
"""w and b of the first expert, log tau, slopes and intercepts of the two experts, logarithms of their variances."""

ERRORS = {
    "tau": "absolute error of tau",
    "gate": "sum of the absolute errors of w, b and tau",
    "w / tau": "absolute error of this ratio, which the density determines with a linear gate too",
    "experts": "sum of the absolute errors of the experts' slopes and intercepts",
    "Hellinger": "distance between the fitted and the true joint density",
}


class Gate(nn.Module):
    """Log-probabilities of the two experts."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        config = DenseToSparseRouterConfig(activation=activation, logit_bias=True, decay="learned", noise=False)
        self.router = config.make(1, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, 1] -> [n, 2]."""
        return torch.log_softmax(self.router.logits(x) / self.router.temperature(), dim=1)


class Mixture:
    """The model p(y | x) with one kind of gate; theta: [9], in the order of TRUTH."""

    def __init__(self, activation: str) -> None:
        self.gate = Gate(activation)

    def gates(self, theta: Tensor, x: Tensor) -> Tensor:
        """[n, 2] log-probabilities. x: [n]."""
        zero = torch.zeros(1, dtype=theta.dtype)
        parameters = {
            "router.weight": torch.cat([theta[0:1], zero])[:, None],
            "router.bias": torch.cat([theta[1:2], zero]),
            "router.log_temperature": theta[2:3],
        }
        return functional_call(self.gate, parameters, (x[:, None],))

    def log_density(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """[n]; x, y: [n]."""
        log_variance = theta[7:9]
        residual = y[:, None] - x[:, None] * theta[3:5] - theta[5:7]
        log_normal = -0.5 * (residual.square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi))
        return torch.logsumexp(self.gates(theta, x) + log_normal, dim=1)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x and y of the true model, [n] each."""
        x = 6 * torch.rand(n, generator=generator, dtype=torch.float64) - 3
        second = torch.rand(n, generator=generator, dtype=torch.float64) >= self.gates(TRUTH, x)[:, 0].exp()
        normal = torch.randn(n, generator=generator, dtype=torch.float64)
        slope, intercept, deviation = (values[second.long()] for values in (TRUTH[3:5], TRUTH[5:7], (TRUTH[7:9] / 2).exp()))
        return x, slope * x + intercept + deviation * normal

    def fit(self, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        """[9], where L-BFGS ends from ``start``."""
        theta = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([theta], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = -self.log_density(theta, x, y).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        return theta.detach()

    def hellinger(self, theta: Tensor, points: int = 200) -> float:
        """Hellinger distance to the true joint density of x and y, on a grid."""
        xs = torch.linspace(-3, 3, points + 1, dtype=torch.float64)[:-1] + 3 / points
        ys = torch.linspace(-12, 12, 4 * points + 1, dtype=torch.float64)
        x, y = xs.repeat_interleave(ys.numel()), ys.repeat(points)
        both = 0.5 * (self.log_density(theta, x, y) + self.log_density(TRUTH, x, y))
        affinity = both.exp().sum() * (ys[1] - ys[0]) / points
        return math.sqrt(max(0.0, 1.0 - float(affinity)))


def replicate(mixture: Mixture, n: int, number: int) -> dict[str, float]:
    """Errors of one fit. All gates see the same random numbers."""
    generator = torch.Generator().manual_seed(1_000_000 * number + n)
    start = TRUTH + START_NOISE * torch.randn(len(TRUTH), generator=generator, dtype=torch.float64)
    theta = mixture.fit(*mixture.sample(n, generator), start)
    (w, b, tau), (true_w, true_b, true_tau) = ((t[0], t[1], t[2].exp()) for t in (theta, TRUTH))
    return {
        "tau": float((tau - true_tau).abs()),
        "gate": float((w - true_w).abs() + (b - true_b).abs() + (tau - true_tau).abs()),
        "w / tau": float((w / tau - true_w / true_tau).abs()),
        "experts": float((theta[3:7] - TRUTH[3:7]).abs().sum()),
        "Hellinger": mixture.hellinger(theta),
    }


def slope(sizes: Sequence[int], errors: Sequence[float]) -> float:
    """Of the least-squares line through log error over log n."""
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


Medians = dict[str, dict[int, dict[str, float]]]
"""Gate -> n -> error -> median over replicates."""


def medians(lines: Sequence[str]) -> Medians:
    """From the lines of the result file, n ascending."""
    found: Medians = {}
    for line in lines:
        entry = json.loads(line)
        by_name = {name: float(np.median([fit[name] for fit in entry["fits"]])) for name in ERRORS}
        found.setdefault(entry["gate"], {})[entry["n"]] = by_name
    return {gate: dict(sorted(found[gate].items())) for gate in GATES if gate in found}


def slopes(found: Medians) -> dict[str, dict[str, float]]:
    """Gate -> error -> slope over all n."""
    return {gate: {name: slope(list(by_n), [each[name] for each in by_n.values()]) for name in ERRORS} for gate, by_n in found.items()}


def acceptance(found: Medians) -> dict[str, bool]:
    """What has to hold for the claim to have appeared."""
    fitted = slopes(found)
    rules = {f"tau error of the {gate} gate falls at least as n^-0.35": fitted[gate]["tau"] <= -0.35 for gate in GATES if gate != "linear"}
    flat = found["linear"][100_000]["tau"] >= 0.5 * found["linear"][10_000]["tau"]
    return {**rules, "tau error of the linear gate at n = 100000 is at least half of that at 10000": flat}


def report(lines: Sequence[str]) -> str:
    """The text of estimation_rate.md."""
    found = medians(lines)
    fitted, replicates = slopes(found), sorted({len(json.loads(line)["fits"]) for line in lines})
    columns = ["n", *(f"{gate}: {name}" for gate in found for name in ("tau", "gate", "experts", "Hellinger"))]
    rows = [columns, ["---:"] * len(columns)]
    for n in next(iter(found.values())):
        rows.append([str(n), *(f"{found[gate][n][name]:.3g}" for gate in found for name in ("tau", "gate", "experts", "Hellinger"))])
    text = [INTRODUCTION.format(replicates=" or ".join(map(str, replicates))), "", *("| " + " | ".join(row) + " |" for row in rows)]
    text += ["", "Fitted slopes of log error over log n, all n:", "", "| gate | " + " | ".join(ERRORS) + " |"]
    text.append("| --- |" + " ---: |" * len(ERRORS))
    text += [f"| {gate} | " + " | ".join(f"{fitted[gate][name]:.2f}" for name in ERRORS) + " |" for gate in fitted]
    text += ["", *(f"- {name}: {meaning}." for name, meaning in ERRORS.items())]
    text += ["", "Rules, checked by the script:", ""]
    text += [f"- {rule}: {'holds' if holds else 'does not hold'}." for rule, holds in acceptance(found).items()]
    return "\n".join(text) + "\n"


def draw(found: Medians, file: Path) -> None:
    """Errors over n, log-log, a panel for each kind of error."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "moetrain", "font.size": 9})
    from matplotlib import pyplot

    fitted, names = slopes(found), ("tau", "w / tau", "experts", "Hellinger")
    figure, panels = pyplot.subplots(1, len(names), figsize=(14, 3.8), layout="constrained")
    for name, panel in zip(names, panels, strict=True):
        for gate, by_n in found.items():
            label = f"{gate}, slope {fitted[gate][name]:.2f}"
            panel.loglog(list(by_n), [each[name] for each in by_n.values()], "o-", markersize=3, linewidth=1.2, label=label)
        sizes = np.array(list(next(iter(found.values()))))
        top = max(by_n[int(sizes[0])][name] for by_n in found.values())
        panel.loglog(sizes, 1.3 * top * (sizes / sizes[0]) ** -0.5, ":", color="grey", linewidth=1, label="n^-1/2")
        panel.set(xlabel="samples n", ylabel="median error", title=name)
        panel.legend(fontsize=7)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=REPLICATES)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="fit nothing")
    options = parser.parse_args(arguments)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.touch()
    done = {(entry["gate"], entry["n"]) for entry in map(json.loads, options.results.read_text().splitlines())}
    for n in [] if options.report else options.sizes:
        for gate in GATES:
            if (gate, n) not in done:
                start, mixture = time.process_time(), Mixture(gate)
                fits = [replicate(mixture, n, number) for number in range(options.replicates)]
                with options.results.open("a") as file:
                    file.write(json.dumps({"gate": gate, "n": n, "fits": fits}) + "\n")
                print(f"{gate}, n {n}: {time.process_time() - start:.1f} s", flush=True)
    lines = options.results.read_text().splitlines()
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / "estimation_rate.md").write_text(report(lines), encoding="utf-8")
    draw(medians(lines), DOCS / "estimation_rate.svg")
    failed = [rule for rule, holds in acceptance(medians(lines)).items() if not holds]
    print("\n".join(f"does not hold: {rule}" for rule in failed) or "all rules hold")
    return 1 if failed else 0


INTRODUCTION = """\
# Rate of estimation of dense-to-sparse gates

Written by `OMP_NUM_THREADS=1 python scripts/experiments/estimation_rate.py`, whose first lines have the setting (claim of
2401.13875). Medians of {replicates} replicates, all seeds fixed; the gates share their random numbers. The linear gate's density
depends on w / tau and b / tau only, so where tau ends depends on the start, and more data stop helping; an activation inside
the scores makes it identifiable. The number of experts is the true one: the slower rates with too many are not shown.

![median errors over n](estimation_rate.svg)"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
