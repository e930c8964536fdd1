"""What every way of placing experts does with routing traces of the default model: tables and figures of docs/placement.

usage: python scripts/bench/placement_figure.py [folder, default docs/placement]
Reads the traces in the folder; writes README.md and one SVG for each trace. Needs matplotlib (pip install -e '.[bench]').
Everything here is modelled from recorded loads; nothing is timed. The traces are those of

    moetrain train launch.nproc_per_node=2 parallel=ep metrics.trace_routing=true train.steps=200 run.dir=runs/balanced
    moetrain train launch.nproc_per_node=2 parallel=ep metrics.trace_routing=true train.steps=200 run.dir=runs/free loss=[]
    gzip -9n < runs/balanced/traces/loads.jsonl > docs/placement/balanced.jsonl.gz      (and the same for free)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.config import load
from moetrain.launch.compose import run_application
from moetrain.simulate.plan import PlanSettings
from moetrain.simulate.plan import main as plan
from moetrain.simulate.report import PlanReport, Table
from moetrain.train.settings import Config

TRACES = {"balanced": "the default model", "free": "the default model without a balance loss (`loss=[]`)"}

GPT_MOE_S = [
    "model.hidden_size=768", "model.num_heads=12", "model.expert_width=1536", "model.shared_width=0", "model.top_k=2", "experts=mlp",
    "train.dtype=bfloat16",
]  # fmt: skip
"""Layers of Hecate's GPT-MoE-S (arXiv 2502.02581) with the 32 experts of its runs on 16 GPUs; as many of them as the trace has."""

HIDDEN = {"A": dict(extra_slots=5, mixer_seconds=1.9e-3), "B": dict(extra_slots=7, mixer_seconds=0.67e-3)}
"""Hecate does not say how long the part before a MoE layer takes: here as long as the transfer of 5 experts of GPT-MoE-S on
cluster A and of 7 on B, which are also the copies that a rank has room for."""

COMMON: dict[str, Any] = dict(nodes=2, tokens_per_rank=8192, transport="two_stage", reshard_every=25)
STATIONARY = dict(trace="zipf:1.2", steps=60)
INTERVALS = [10, 25, 50, 100]
ABLATION = ["EP", "paper: Algorithm 2", "paper: Algorithm 1", "paper: Algorithms 1, 2"]
SMOOTHED = 9
"""Steps of the running mean in the figures."""


def compare(overrides: list[str], **settings: Any) -> PlanReport:
    """The report of ``moetrain plan`` for these overrides and settings."""
    reports: list[PlanReport] = []
    run_application(overrides, lambda plain: reports.append(plan(PlanSettings(**COMMON | settings), load(Config, plain))))
    return reports[0]


def markdown(table: Table) -> str:
    """A table with numbers to the right."""
    ruler = ["---"] + ["---:"] * (len(table.columns) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [table.columns, ruler, *table.rows])


def draw(report: PlanReport, title: str, file: Path) -> None:
    """Balance over steps, and bytes per step by tier."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "moetrain", "font.size": 9})
    from matplotlib import pyplot

    figure, (balance, traffic) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    steps = report.warm_up + np.arange(report.steps) + 1
    window = np.ones(SMOOTHED) / SMOOTHED
    for number, each in enumerate(report.replays):
        smooth = np.convolve(each.load.mean(axis=1), window, mode="valid")
        style = "-" if number < 5 else "--"
        middle = steps[SMOOTHED // 2 : SMOOTHED // 2 + smooth.size]
        balance.plot(middle, smooth, style, label=each.figures.name, linewidth=1.2, color=f"C{number}")
    balance.set(xlabel="training step", ylabel=f"rows of the busiest rank / mean (mean of {SMOOTHED} steps)", title="balance", yscale="log")
    balance.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    balance.yaxis.set_minor_formatter(matplotlib.ticker.ScalarFormatter())
    balance.legend(fontsize=7, ncols=2)

    names = [figures.name for figures in report.strategies]
    parts = {
        "tokens within nodes": [f.tokens.intra for f in report.strategies],
        "tokens between nodes": [f.tokens.inter for f in report.strategies],
        "experts within nodes": [f.gather.intra + f.reduce.intra for f in report.strategies],
        "experts between nodes": [f.gather.inter + f.reduce.inter for f in report.strategies],
    }
    left = np.zeros(len(names))
    for (label, values), color in zip(parts.items(), ["#9ecae1", "#08519c", "#fdae6b", "#a63603"], strict=True):
        traffic.barh(names, np.array(values) / 1e9, left=left / 1e9, label=label, color=color)
        left += np.array(values)
    traffic.invert_yaxis()
    traffic.set(xlabel="GB per step, all ranks and MoE layers", title="bytes")
    traffic.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)
    figure.suptitle(f"{title}, 2 x 8 ranks: replayed loads, not a measurement")
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def traces(folder: Path) -> dict[str, dict[str, Any]]:
    """Settings that name the recorded traces, and a synthetic one."""
    return {**{trace: dict(trace=str(folder / f"{trace}.jsonl.gz")) for trace in TRACES}, "zipf:1.2": STATIONARY}


def gpt_moe_s(cluster: str, trace: dict[str, Any], **settings: Any) -> PlanReport:
    """GPT-MoE-S on one of Hecate's clusters."""
    return compare(GPT_MOE_S, cluster=f"hecate_{cluster.lower()}", **HIDDEN[cluster], **trace, **settings)


def ablation(reports: dict[tuple[str, str], PlanReport]) -> tuple[Table, list[str]]:
    """Speed-ups over EP, and for each trace and cluster whether the paper's order holds."""
    columns = ["placement (simulated)", *(f"{trace}, {cluster}" for trace, cluster in reports)]
    columns += [f"load, {trace}" for trace, cluster in reports if cluster == "A"]
    table, orders = Table(columns), []
    for number, figures in enumerate(next(iter(reports.values())).strategies):
        each = [report.strategies[number] for report in reports.values()]
        speedups = [f"{report.speedup(f):.2f}" for report, f in zip(reports.values(), each, strict=True)]
        loads = [f"{f.load_mean:.2f}" for (_, cluster), f in zip(reports, each, strict=True) if cluster == "A"]
        table.rows.append([figures.name, *speedups, *loads])
    for (trace, cluster), report in reports.items():
        by_name = {f.name: report.speedup(f) for f in report.strategies}
        values = [by_name[name] for name in ABLATION]
        holds = all(a < b for a, b in zip(values, values[1:], strict=False))
        numbers = ", ".join(f"{value:.3f}" for value in values)
        orders.append(f"- {trace}, cluster {cluster}: {numbers}: the order {'holds' if holds else 'does not hold'}.")
    return table, orders


def intervals(folder: Path) -> Table:
    """Speed-ups over EP on cluster A by the number of steps between new owners."""
    names = ["paper: Algorithm 2", "paper: Algorithms 1, 2", "EPLB"]
    table = Table(["placement (simulated)", *(f"{trace}, every {every}" for trace in TRACES for every in INTERVALS)])
    found: dict[str, list[str]] = {name: [] for name in names}
    for trace in TRACES:
        for every in INTERVALS:
            report = gpt_moe_s("A", traces(folder)[trace], reshard_every=every)
            for figures in report.strategies:
                if figures.name in found:
                    found[figures.name].append(f"{report.speedup(figures):.2f}")
    table.rows.extend([name, *values] for name, values in found.items())
    return table


def main(folder: Path) -> None:
    """Write README.md and the figures."""
    text = ["# Placement of experts on recorded loads", "", INTRODUCTION]
    for trace, title in TRACES.items():
        report = compare([], cluster="hecate_a", extra_slots=4, **traces(folder)[trace])
        draw(report, title.replace("`", ""), folder / f"{trace}.svg")
        error = report.strategies[0].prediction_error
        text += ["", f"## Trace `{trace}`: {title}", "", f"Prediction error (|actual - predicted| / actual, mean of steps): {error:.2f}."]
        text += ["", f"![balance and bytes, {trace}]({trace}.svg)"]
        for table in report.tables():
            text += ["", markdown(table)]
    reports = {(trace, cluster): gpt_moe_s(cluster, settings) for trace, settings in traces(folder).items() for cluster in HIDDEN}
    table, orders = ablation(reports)
    text += ["", "## Ablation, simulated", "", ABLATION_TEXT, "", markdown(table), "", ORDER_TEXT, "", *orders]
    text += ["", "Steps between new owners, cluster A:", "", markdown(intervals(folder))]
    (folder / "README.md").write_text("\n".join(text) + "\n", encoding="utf-8")


INTRODUCTION = """\
Written by `python scripts/bench/placement_figure.py`, whose first lines say how the traces were made: 200 steps of 16
sequences of 256 tokens on 2 ranks (`moetrain train ... metrics.trace_routing=true`), 3 MoE layers, 32 experts, 4 of them active.
**Everything below is modelled**: recorded loads are cut into 16 ranks and scaled to 8192 tokens per rank, planners see the
mean of the five steps before (FasterMoE the step itself, after the gate), new owners and EPLB's placements come every 25 steps,
copies travel in two stages. Steps 1 to 5 are history only.

The tables have the default model's own sizes, on 2 nodes with 8 ranks each with the links and processors of Hecate's cluster A
(`moetrain plan cluster=hecate_a nodes=2 extra_slots=4 tokens_per_rank=8192 transport=two_stage reshard_every=25
trace=docs/placement/balanced.jsonl.gz`). Load: rows of the busiest rank over the mean of all, by layer and step.
Bytes: of all ranks and MoE layers, per step. Memory: of the fullest rank, without activations."""

ABLATION_TEXT = """\
Layers with the sizes of Hecate's GPT-MoE-S (two-matrix experts, 768 x 1536, 16 bit), 32 experts as in its runs on 16 GPUs; 2
nodes of its clusters A and B; the time before a MoE layer hides 5 (A) and 7 (B) experts between nodes, and as many copies
fit on a rank. Numbers are EP's modelled time of the MoE layers over that of the placement."""

ORDER_TEXT = """\
Hecate's ablation finds EP < sharding only (Algorithm 2) < materialisation only (Algorithm 1) < both. Algorithm 2 assumes loads
that drift slowly, as those of `zipf:1.2`, which differ by sampling only. In the recorded traces, the first 200 steps of a small
model with 4096 tokens per step, they do not: see the errors of prediction. Modelled speed-ups over EP in that order:"""


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2] / "docs" / "placement")
