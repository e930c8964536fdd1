"""Small honest experiments: does a small byte-level language model show what the papers of the routing methods claim?

usage: OMP_NUM_THREADS=1 python scripts/experiments/routing.py [--only ARM ...] [--seeds 0 1 2] [--steps N] [--report]

Trains every arm of ARMS with every seed, in this process, and appends one line per run to
results/routing.jsonl beside this file; a run that is there already with the same overrides is not repeated. Then
writes docs/experiments/README.md (routing_report.py has the claims and their rule). --report: only that.
A run is what `moetrain train` makes of the overrides in its line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from routing_report import report
from torch import Tensor

from moetrain.data import PackedSequences, prepare
from moetrain.launch.compose import compose
from moetrain.launch.local import train
from moetrain.moe.routing import PAD, Routing
from moetrain.objectives.batch import IGNORE, Batch
from moetrain.objectives.consistency import symmetric_divergence
from moetrain.parallel.ranks import Ranks
from moetrain.train.data import BatchPlan
from moetrain.train.flops import FlopCounter
from moetrain.train.restore import RestoredRun, restore
from moetrain.train.step import on_device

RESULTS = Path(__file__).parent / "results" / "routing.jsonl"
REPORT = Path(__file__).parents[2] / "docs" / "experiments" / "README.md"
SEEDS = (0, 1, 2)
STEPS = 400
EXPERTS, WIDTH, LAYERS = 8, 64, 3

BASE = (
    "model.hidden_size=64", f"model.num_layers={LAYERS}", "model.num_heads=4", "model.head_dim=16", "model.dense_layers=0",
    "model.shared_width=0", f"model.num_experts={EXPERTS}", f"model.expert_width={WIDTH}", "model.dense_width=1", "model.init_std=0.1",
    "data.tokenizer=bytes", "data.seq_len=64", "train.global_batch_size=8", "optim.lr=0.005", "train.threads=1", "train.device=cpu",
    "checkpoint.every_steps=100000", "metrics.every_steps=10", "metrics.eval_batches=1", "logging.display=none",
    "logging.sample_prompt=null",
)  # fmt: skip
"""Overrides that all runs share: 3 layers of 8 experts, width 64, on the default text as bytes."""

EVALUATION_BATCH, EVALUATION_BATCHES = 64, 4
NOISE = 0.1
"""Share of input bytes that the noisy evaluation replaces by others at random; targets stay."""


@dataclass(frozen=True)
class Arm:
    """overrides: beyond BASE. also: further evaluations by name, each with other settings of the router. draws: compare two
    evaluations that draw other experts."""

    overrides: tuple[str, ...]
    also: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    draws: bool = False


def with_top_k(*numbers: int) -> dict[str, dict[str, Any]]:
    """Evaluations with other numbers of experts per token."""
    return {f"k={number}": {"top_k": number} for number in numbers}


THRESHOLD = {"threshold": {"evaluation": "threshold"}}
ENSEMBLE = {"ensemble": {"evaluation": "ensemble"}}

TOP2 = ("router=mixtral", "loss=[per_token_balance]", "model.top_k=2")
SWITCH = ("experiment=switch", "model.top_k=1", "capacity=none")
MOE_PLUS_PLUS = ("experiment=moe-plus-plus",)
RMOE = ("experiment=rmoe", "model.top_k=2", "router.state_size=32")
SMOE_DROPOUT = ("experiment=smoe-dropout", "model.top_k=2")
THOR = ("experiment=thor", "model.num_experts=2")
SIGMOID = ("router=aux_free", "model.top_k=2")
MIXER = (*TOP2, "mixer.mu=0.7", "mixer.gamma=0.3")
COMET = ("experiment=comet", "router=comet", "loss=[selector_entropy]")
DSELECT = ("router=dselect_k", "loss=[selector_entropy]", "model.top_k=2")
WEAK = "loss.selector_entropy.coefficient=0.005"

ARMS = {
    "top-2": Arm(TOP2, also=with_top_k(1, 4, 8)),
    "top-p": Arm(("experiment=dynamic-routing", "model.top_k=2", "loss.entropy.coefficient=0.01")),
    "top-p, paper's entropy loss": Arm(("experiment=dynamic-routing", "model.top_k=2")),
    "top-p, no entropy loss": Arm(("experiment=dynamic-routing", "model.top_k=2", "loss.entropy.coefficient=0")),
    "AdaMoE": Arm(("experiment=adamoe", "model.top_k=4", "loss.null_balance.coefficient=0.01")),
    "SMoE-Dropout": Arm(SMOE_DROPOUT, also=with_top_k(1, 2, 4)),
    "Switch": Arm(SWITCH),
    "dense-to-sparse": Arm(("experiment=evomoe", "experts.spawn.after=0"), also=THRESHOLD),
    "EvoMoE": Arm(("experiment=evomoe",), also=THRESHOLD),
    "aux-free": Arm((*SIGMOID, "loss=[]")),
    "aux loss": Arm((*SIGMOID, "router.selection_bias=false", "router.bias_update_rate=0", "loss=[global_balance]")),
    "no balance": Arm((*SIGMOID, "router.selection_bias=false", "router.bias_update_rate=0", "loss=[]")),
    "MoE++": Arm(MOE_PLUS_PLUS),
    "MoE++, no capacity": Arm(("router=moe_plus_plus", "loss=[heterogeneous_balance]", "model.top_k=2")),
    "RMoE": Arm(RMOE),
    "RMoE, restarted": Arm((*RMOE, "router.state=restarted")),
    "MomentumSMoE": Arm(("mixer=momentum", *MIXER)),
    "AdamSMoE": Arm(("mixer=adam", *MIXER)),
    "AdamSMoE, step 0.1": Arm(("mixer=adam", *MIXER, "mixer.step=0.1")),
    "THOR": Arm(THOR, also=ENSEMBLE, draws=True),
    "THOR, alpha 0": Arm((*THOR, "objective.alpha=0"), also=ENSEMBLE, draws=True),
    "Switch, 2 experts": Arm((*SWITCH, "model.num_experts=2")),
    "COMET": Arm(COMET),
    "DSelect-k": Arm(("router=dselect_k", "loss=[selector_entropy]", "loss.selector_entropy.coefficient=0.05", "model.top_k=2")),
    "COMET+": Arm(("experiment=comet",)),
    "COMET, entropy 0.005": Arm((*COMET, WEAK)),
    "DSelect-k, entropy 0.005": Arm((*DSELECT, WEAK)),
    "COMET+, entropy 0.005": Arm(("experiment=comet", WEAK)),
    "frozen random top-2": Arm((*SMOE_DROPOUT, "router.top_k=2"), also=with_top_k(1, 4, 8)),
    "dense": Arm(("model=dense_tiny", f"model.dense_layers={LAYERS}", f"model.dense_width={EXPERTS * WIDTH}")),
    "MoE++, tau 0.25": Arm((*MOE_PLUS_PLUS, "loss.heterogeneous_balance.tau=0.25")),
    "MoE++, no residual": Arm(
        (*MOE_PLUS_PLUS, "router=topk", *(f"router.zero_experts.num_{count}" for count in ("constant=2", "copy=1", "null=1")))
    ),
}  # fmt: skip


def all_overrides(name: str, seed: int, steps: int) -> list[str]:
    """What identifies a run."""
    return [*BASE, f"train.steps={steps}", f"train.seed={seed}", *ARMS[name].overrides]


def present(lines: Sequence[str], steps: int) -> list[str]:
    """Lines of results with the present settings of their arm, in the order of ARMS and seeds."""
    found = {(entry["arm"], entry["seed"]): (entry["overrides"], line) for line in lines for entry in [json.loads(line)]}
    order = sorted((key for key in found if key[0] in ARMS), key=lambda key: (list(ARMS).index(key[0]), key[1]))
    return [found[key][1] for key in order if found[key][0] == all_overrides(*key, steps)]


def run(arm: Arm, overrides: Sequence[str]) -> dict[str, float]:
    """Train with these overrides in a temporary folder; all figures of the run by name."""
    folder = tempfile.mkdtemp(prefix="moetrain-experiment-")
    try:
        start = time.process_time()
        result = train(compose(*overrides, f"run.dir={folder}/run"))
        if result["status"] != "complete":
            sys.exit(128 + result["signal"])
        seconds = time.process_time() - start
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        return {**training_figures(lines), **evaluation_figures(arm, f"{folder}/run"), "train_cpu_seconds": seconds}
    finally:
        shutil.rmtree(folder)


def training_figures(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """From metrics.jsonl: choices of experts per token and layer in the first (with experts), middle and last steps recorded,
    and MFLOP per token."""

    def active(some: Sequence[dict[str, Any]]) -> float:
        means = [sum(layer["load"][:EXPERTS]) / line["tokens"] for line in some for layer in line["experts"].values()]
        return sum(means) / max(1, len(means))

    routed = [line for line in lines if line["experts"]]
    tenth, middle = max(1, len(lines) // 10), len(lines) // 2
    flops = [line["model_flops_per_second"] * line["step_seconds"] / line["tokens"] for line in lines]
    return {
        "train active, start": active(routed[:tenth]),
        "train active, middle": active(lines[middle - tenth // 2 : middle + tenth // 2 + 1]),
        "train active, end": active(routed[-tenth:]),
        "train MFLOP": mean(flops) / 1e6,
    }


def evaluation_figures(arm: Arm, folder: str) -> dict[str, float]:
    """Held-out loss, clean and noisy, and what the experts do there."""
    trained = restore(folder, device="cpu")
    figures = measure(trained)
    noisy = measure(trained, noise=NOISE)
    figures.update({f"noisy {name}": noisy[name] for name in ("loss", "active") if name in noisy})
    for name, settings in arm.also.items():
        figures[f"loss, {name}"] = measure(restore(folder, device="cpu", router=settings))["loss"]
    if arm.draws:
        figures["disagreement"] = disagreement(trained)
    return figures


def evaluation_batches(trained: RestoredRun, noise: float = 0.0) -> Iterator[Batch]:
    """The same held-out sequences for all runs, with the same noise."""
    config, data = trained.config, prepare(trained.config.data)
    sequences = PackedSequences(data.evaluation, seq_len=config.data.seq_len, eos_id=data.eos_id)
    generator = torch.Generator().manual_seed(0)
    for batch in BatchPlan(sequences, 0, EVALUATION_BATCH, EVALUATION_BATCH, Ranks()).evaluation_batches(EVALUATION_BATCHES):
        if noise:
            other = torch.randint(256, batch.tokens.shape, generator=generator)
            batch.tokens = torch.where(torch.rand(batch.tokens.shape, generator=generator) < noise, other, batch.tokens)
        yield batch


@torch.no_grad()
def measure(trained: RestoredRun, noise: float = 0.0) -> dict[str, float]:
    """Loss in nats per byte; per token and MoE layer: active experts (mean, deviation over tokens), router entropy, deviation
    of the largest probability; load of the fullest expert over the mean; MFLOP of a forward pass per token."""
    model, objective = trained.placed.model, trained.config.objective.build()
    layers = model.moe_layers()
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def observe(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, routing: Routing) -> None:
            real = (routing.expert != PAD) & (routing.expert < routing.num_experts)
            count = torch.bincount(routing.token[real], minlength=routing.num_tokens)
            top = torch.zeros(routing.num_tokens) if routing.probs is None else routing.probs.amax(1)
            seen[name].append((count.double(), top.double()))

        return hook

    hooks = [layer.router.register_forward_hook(observe(name)) for name, layer in layers.items()]
    loss, tokens, statistics = 0.0, 0, {}
    for batch in evaluation_batches(trained, noise):
        batch, ctx = on_device(batch, trained.placed, training=False, seed=0, step=0, total_steps=1)
        loss += float(objective(model, batch, ctx).main)
        tokens += int((batch.targets != IGNORE).sum())
        for name, layer in ctx.statistics.items():
            statistics[name] = statistics[name] + layer if name in statistics else layer
    for hook in hooks:
        hook.remove()
    rows = {name: int(layer.dispatched[: layers[name].experts.num_experts].sum()) for name, layer in statistics.items()}
    figures = {"loss": loss / tokens, "MFLOP": FlopCounter(model).step(tokens, trained.config.data.seq_len, rows) / 3 / tokens / 1e6}
    if not layers:
        return figures
    by_layer = [count / int(layer.tokens) for count, layer in zip(rows.values(), statistics.values(), strict=True)]
    loads = [layer.selected[: layers[name].experts.num_experts].double() for name, layer in statistics.items()]
    counts, tops = ([torch.cat([entry[i] for entry in seen[name]]) for name in layers] for i in (0, 1))
    return figures | {
        "active": mean(by_layer),
        "active, first layer": by_layer[0],
        "active, last layer": by_layer[-1],
        "active, deviation": mean([float(count.std()) for count in counts]),
        "top probability, deviation": mean([float(top.std()) for top in tops]),
        "entropy": mean([float(layer.entropy / layer.tokens) for layer in statistics.values()]),
        "max/mean load": mean([float(load.max() / load.mean()) for load in loads]),
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def disagreement(trained: RestoredRun) -> float:
    """Symmetric KL in nats per token between two evaluations that draw other experts."""
    model, total, tokens = trained.placed.model, 0.0, 0
    for batch in evaluation_batches(trained):
        logits = []
        for seed in (0, 1):
            placed, ctx = on_device(batch, trained.placed, training=False, seed=seed, step=0, total_steps=1)
            logits.append(model(placed.tokens, ctx, document=placed.document).flatten(0, 1))
        valid = batch.targets.flatten() != IGNORE
        total += float(symmetric_divergence(*logits, model.vocabulary)[valid].sum())
        tokens += int(valid.sum())
    return total / tokens


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ARMS), metavar="ARM", default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.touch()
    done = [json.loads(line)["overrides"] for line in options.results.read_text().splitlines()]
    for name in [] if options.report else options.only:
        for seed in options.seeds:
            overrides = all_overrides(name, seed, options.steps)
            if overrides not in done:
                figures = run(ARMS[name], overrides)
                with options.results.open("a") as file:
                    file.write(json.dumps({"arm": name, "seed": seed, "overrides": overrides, "figures": figures}) + "\n")
                print(f"{name}, seed {seed}: {figures['loss']:.4f}", flush=True)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(report(present(options.results.read_text().splitlines(), options.steps)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
