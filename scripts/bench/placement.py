"""What the benchmarks of expert placement share: routing traces, the systems that are compared, and measured steps of
one MoE layer.

Everything but the router and what precedes the layer is the library's own: executor, planners, prediction, collectives.
A trace takes the router's place; before the layer stands a window of dense products under which copies can travel.

Letters: T tokens per rank, D model, F expert hidden, E experts, K choices per token, R ranks.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import moetrain.components  # noqa: F401  fills the registry
from moetrain.launch.local import keep_freed_memory
from moetrain.models.common.decoder import Block, Decoder
from moetrain.models.common.layers import RMSNorm
from moetrain.moe.context import ForwardContext, RouterContext
from moetrain.moe.layer import MoELayer
from moetrain.moe.routers.base import Router
from moetrain.moe.routing import Routing, fixed_routing
from moetrain.parallel.collectives import traffic
from moetrain.parallel.executor import Copies, Links, PlacedExecutor
from moetrain.parallel.layouts import Layout
from moetrain.parallel.parallelize import ParallelModel, connect, place_experts
from moetrain.parallel.placement.cost import layer_time
from moetrain.parallel.placement.scheduler import LayerFigures
from moetrain.parallel.ranks import Ranks
from moetrain.parallel.scheduling import layer_cost
from moetrain.registry import lookup
from moetrain.testing.tolerances import assert_close

SYSTEMS = ("ep", "fssdp_paper", "fssdp")
"""Names of layouts, with the settings that users get by default; one more name here is one more system."""

NAME = "layers.0"
"""Of the one block."""


# Routing traces


def routing_trace(kind: str, steps: int, tokens: int, experts: int, top_k: int, seed: int) -> Tensor:
    """Expert ids [steps, tokens, top_k] int64, distinct for each token; the same for the same arguments.

    kind: ``uniform``; ``zipf:A``, the choices of a router whose logits are -A ln(rank of the expert) plus standard normal
    noise, the hottest experts with the lowest ids; ``one``, every token to the first ``top_k`` experts; or a file
    ``loads.jsonl`` that ``metrics.trace_routing`` has written, or that gzipped, ``FILE:LAYER`` for another than its first
    layer: its last ``steps`` steps.

    Raises ValueError for another kind, and for a file whose loads do not fit.
    """
    if kind == "one":
        return torch.arange(top_k).expand(steps, tokens, top_k).contiguous()
    generator = np.random.default_rng(seed)
    if kind == "uniform" or kind.startswith("zipf:"):
        exponent = float(kind.removeprefix("zipf:")) if kind != "uniform" else 0.0
        logits = generator.standard_normal((steps, tokens, experts), dtype=np.float32)
        logits -= (exponent * np.log(np.arange(1, experts + 1))).astype(np.float32)
        return torch.from_numpy(np.argsort(-logits, axis=-1, kind="stable")[..., :top_k].copy())
    path, _, layer = kind.partition(":")
    if not Path(path).is_file():
        raise ValueError(f"trace {kind!r} is none of uniform, zipf:A, one, and no file")
    loads = read_loads(Path(path), layer, steps)
    if loads.shape[1] != experts:
        raise ValueError(f"{path} has loads of {loads.shape[1]} experts, not of {experts}")
    return torch.from_numpy(np.stack([choices_with_loads(load, tokens, top_k, generator) for load in loads]))


def read_loads(path: Path, layer: str, steps: int) -> np.ndarray:
    """[steps, E] loads of all ranks together, of the file's last steps; of its first layer if ``layer`` is empty."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        lines = [json.loads(line)["loads"] for line in file]
    if len(lines) < steps:
        raise ValueError(f"{path} has {len(lines)} steps, {steps} are needed")
    layer = layer or next(iter(lines[0]))
    if layer not in lines[0]:
        raise ValueError(f"{path} has no layer {layer!r}, but {', '.join(lines[0])}")
    return np.array([line[layer] for line in lines[-steps:]]).sum(axis=1)


def choices_with_loads(loads: np.ndarray, tokens: int, top_k: int, generator: np.random.Generator) -> np.ndarray:
    """[tokens, top_k] distinct experts whose shares are those of ``loads`` [E], up to a token, by systematic sampling: on
    a line of segments as long as the shares, a token takes the segments at ``top_k`` places at unit distance."""
    share = loads * top_k / loads.sum()
    if share.max() > 1:
        raise ValueError(
            f"expert {share.argmax()} has {share.max() / top_k:.0%} of the loads: no {top_k} distinct choices per token give that"
        )
    ends = share.cumsum()
    ends[-1] = top_k
    first = (generator.permutation(tokens) + generator.random()) / tokens
    return np.searchsorted(ends, first[:, None] + np.arange(top_k), side="right")


def digest(trace: Tensor) -> str:
    """SHA-256 of the first step's ids as little-endian int16; a generated trace of more steps only continues."""
    return hashlib.sha256(trace[0].numpy().astype("<i2").tobytes()).hexdigest()


def committed_digest(kind: str, tokens: int, experts: int, top_k: int, seed: int) -> str | None:
    """Of a generated trace, from traces.json; None if it is not there."""
    arguments = [kind, tokens, experts, top_k, seed]
    committed = json.loads(Path(__file__).with_name("traces.json").read_text(encoding="utf-8"))
    return next((entry["sha256"] for entry in committed if entry["arguments"] == arguments), None)


def rank_imbalance(trace: Tensor, experts: int, ranks: int) -> float:
    """Load of the busiest rank over the mean when ranks own equally many neighbouring experts."""
    loads = torch.bincount(trace.reshape(-1) * ranks // experts, minlength=ranks)
    return float(loads.max() * ranks / loads.sum())


# One MoE layer under one system


@dataclass(frozen=True)
class Case:
    """What is measured. window: dense D x D products before the layer. inter_bandwidth: bytes/s between nodes, as
    planners and the cost model are told; None: their default. extra_slots, overlap_degree: of systems with copies; None:
    their default."""

    systems: tuple[str, ...] = SYSTEMS
    trace: str = "zipf:1.2"
    tokens: int = 4096
    hidden: int = 512
    width: int = 512
    experts: int = 16
    top_k: int = 2
    window: int = 0
    rounds: int = 5
    warmup: int = 2
    seed: int = 0
    extra_slots: int | None = None
    overlap_degree: int | None = None
    inter_bandwidth: float | None = None

    def layout(self, system: str, ranks: int) -> Layout:
        """The layout of that name with its defaults, but for what this case sets."""
        layout: Layout = lookup("parallel", system)().resolve(ranks)
        chosen = {"extra_slots": self.extra_slots, "overlap_degree": self.overlap_degree}
        return replace(layout, fssdp=replace(layout.fssdp, **{name: value for name, value in chosen.items() if value is not None}))

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """One option per field."""
        for name, default in asdict(cls()).items():
            option = f"--{name.replace('_', '-')}"
            if name == "systems":
                parser.add_argument(option, nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
            else:
                parse = {"inter_bandwidth": float, "extra_slots": int, "overlap_degree": int}.get(name, type(default))
                parser.add_argument(option, type=parse, default=default, help=f"default: {default}")

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Case:
        """From parsed options of :meth:`add_arguments`."""
        values = {name: getattr(options, name) for name in asdict(cls())}
        return cls(**{**values, "systems": tuple(values["systems"])})


class TraceRouter(Router):
    """The choices that it is given, all with equal weights."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.choices = torch.empty(0, 1, dtype=torch.int64)

    def forward(self, x: Tensor, ctx: RouterContext) -> Routing:
        weight = torch.full(self.choices.shape, 1 / self.choices.shape[1])
        return fixed_routing(self.choices, weight, num_experts=self.num_experts)


class Window(nn.Module):
    """``products`` residual D x D products in place of attention; their backward takes twice as long."""

    def __init__(self, products: int, hidden: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(hidden, hidden)) for _ in range(products))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x + F.linear(x, weight)
        return x


class PlacedLayer:
    """The layer under one system on this rank. Its weights do not depend on the system."""

    def __init__(self, layout: Layout, case: Case, links: Links) -> None:
        cpu, self.links, self.layout = torch.device("cpu"), links, layout
        self.router = TraceRouter(case.experts)
        self.figures: LayerFigures
        with torch.device("meta"):
            experts = lookup("experts", "ffn")(num_experts=case.experts, width=case.width).build(case.hidden, dtype=torch.float32)
            self.layer = MoELayer(router=self.router, capacity=lookup("capacity", "none")().build(), experts=experts, losses={})
            self.window = Window(case.window, case.hidden)
            norm = RMSNorm(case.hidden, eps=1e-6, dtype=torch.float32)
            block = Block(name=NAME, attn_norm=norm, attn=self.window, ffn_norm=norm, ffn=self.layer)  # type: ignore[arg-type]
            model = Decoder(vocab_size=1, hidden_size=case.hidden, blocks=[block], norm=norm, head=None, head_dim=1, rope_theta=None,
                            logit_scale=1.0, compute_dtype=torch.float32, init={})  # fmt: skip
        placement = place_experts(model, layout, links, cpu, False, case.tokens)
        model.to_empty(device=cpu)
        self.placed = ParallelModel(model, layout, cpu, frozenset(), world=dist.group.WORLD, **placement)
        with torch.no_grad():
            for row, expert in enumerate(self.layer.experts.held):
                for weight in self.layer.experts.weights():
                    weight[row].normal_(std=case.hidden**-0.5, generator=torch.Generator().manual_seed(expert))
            for i, weight in enumerate(self.window.weights):
                weight.normal_(std=0.1 * case.hidden**-0.5, generator=torch.Generator().manual_seed(1000 + i))

        assert isinstance(self.layer.executor, PlacedExecutor)
        self.executor = self.layer.executor
        flops = 2.0 * case.tokens * case.hidden**2 * case.window
        self.cost = layer_cost(experts, case.hidden, torch.float32, layout.fssdp, mixer_flops=flops, cluster=links.cluster)

    def step(self, x: Tensor, gradient: Tensor, choices: Tensor) -> Tensor:
        """Plan, forward and backward, as a training step does them. x, gradient: [1, T, D]; choices: [T, K]. Returns the
        layer's output; :attr:`figures` are then those of this step."""
        self.placed.begin_step()
        self.router.choices = choices
        ctx = ForwardContext(batch_size=1, seq_len=x.shape[1], training=True)
        at = ctx.at(NAME)
        self.layer.prefetch(at)
        y = self.layer(self.window(x), at)
        y.backward(gradient)
        self.executor.add_gradients()
        (self.figures,) = self.placed.end_step(ctx.statistics).values()
        return y.detach()

    def take_gradients(self) -> list[Tensor]:
        """Gradients of this rank's experts; all parameters are then without one, as a step expects them."""
        gradients = [weight.grad for weight in self.layer.experts.weights() if weight.grad is not None]
        self.placed.model.zero_grad(set_to_none=True)
        return gradients

    def modelled_seconds(self) -> float:
        """What the cost model says of the last step, window included."""
        plan, cluster, counts = self.executor.plan, self.links.cluster, self.figures.counts
        split = self.executor.split(counts, plan, cluster)
        modelled = layer_time(split, plan, cluster, self.cost, transport=self.layout.fssdp.transport)
        return modelled.total + self.cost.hidden_forward + self.cost.hidden_backward

    def transfer_alone(self) -> float:
        """Seconds of SparseAllGather of the present plan's copies with nothing to hide behind; 0 without copies."""
        if not self.executor.plan.copies.any():
            return 0.0
        seconds = []
        for _ in range(3):
            copies = Copies(self.executor.plan, self.layer.experts, self.links, dtype=torch.float32, transport=self.layout.fssdp.transport)
            seconds.append(max(gather(timed(copies.wait)["seconds"])))
        return statistics.median(seconds)


# Measuring


def balanced_products(case: Case, ranks: int) -> Callable[[], None]:
    """The nine products of an expert's forward and backward, for a rank's share of experts and of perfectly spread rows:
    what a step would cost if it were nothing else. Results go to memory that is there already, without autograd."""
    experts = max(1, case.experts // ranks)
    rows, hidden, width = case.tokens * case.top_k // experts, case.hidden, case.width
    x, y = torch.randn(rows, hidden), torch.empty(rows, hidden)
    gate, up = torch.randn(rows, width), torch.randn(rows, width)
    weights = [(torch.randn(width, hidden), torch.randn(width, hidden), torch.randn(hidden, width)) for _ in range(experts)]
    gradients = [tuple(torch.empty_like(w) for w in triple) for triple in weights]

    def run() -> None:
        for (w_gate, w_up, w_down), (g_gate, g_up, g_down) in zip(weights, gradients, strict=True):
            torch.mm(x, w_gate.t(), out=gate)
            torch.mm(x, w_up.t(), out=up)
            torch.mm(gate, w_down.t(), out=y)
            torch.mm(y.t(), gate, out=g_down)
            torch.mm(y, w_down, out=up)
            torch.mm(gate.t(), x, out=g_gate)
            torch.mm(up.t(), x, out=g_up)
            torch.mm(gate, w_gate, out=y)
            torch.mm(up, w_up, out=y)

    return run


def timed(action: Callable[[], Any]) -> dict[str, float]:
    """Wall-clock and processor seconds of an action that all ranks begin together; the latter of all threads of this
    process, those of gloo included."""
    dist.barrier()
    wall, processor = time.perf_counter(), time.process_time()
    action()
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - processor}


def gather(value: Any) -> list[Any]:
    """Values of all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def connect_ranks(case: Case, products: Callable[[], None]) -> Links:
    """Communicators between all ranks. Planners are told the rate of products that all ranks reach at the same time."""
    ranks = Ranks.detect()
    links = connect(case.layout(case.systems[0], ranks.world_size), ranks, torch.device("cpu"))
    products()
    seconds = statistics.mean(gather(min(timed(products)["seconds"] for _ in range(3))))
    cluster = replace(links.cluster, flops=18.0 * case.tokens * case.top_k * case.hidden * case.width / seconds)
    if case.inter_bandwidth is not None:
        cluster = replace(cluster, inter_bandwidth=case.inter_bandwidth)
    return replace(links, cluster=cluster)


def measure(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    """Interleaved rounds of all systems on one trace; collective over the default group, the same result on all ranks.

    Returns ``setup``, what was measured and where; ``rounds``, for each measured round and system what :func:`measure_step`
    returns; ``transfer_seconds``, by system, of :meth:`PlacedLayer.transfer_alone`.

    Raises AssertionError if the systems' outputs or gradients differ.
    """
    torch.set_num_threads(1)
    keep_freed_memory()  # as training does
    steps = case.warmup + case.rounds
    arguments = (case.tokens * world_size, case.experts, case.top_k, case.seed)
    trace = routing_trace(case.trace, steps, *arguments)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(1, case.tokens, case.hidden, generator=generator)
    gradient = torch.randn(1, case.tokens, case.hidden, generator=generator)
    products = balanced_products(case, world_size)
    links = connect_ranks(case, products)
    layers = {name: PlacedLayer(case.layout(name, world_size), case, links) for name in case.systems}
    setup = {
        **asdict(case),
        "nodes": links.cluster.node_of,
        "cluster": {key: getattr(links.cluster, key) for key in ("intra_bandwidth", "inter_bandwidth", "latency", "flops")},
        "trace_sha256": digest(trace),
        "trace_is_committed": committed_digest(case.trace, *arguments) == digest(trace),
        "rank_imbalance": rank_imbalance(trace[case.warmup :], case.experts, world_size),
        "load_average": [os.getloadavg()[0]],
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }

    rounds: list[dict[str, Any]] = []
    for number, choices in enumerate(trace[:, rank * case.tokens :][:, : case.tokens], start=-case.warmup):
        spent = gather(timed(products)["cpu_seconds"])
        expected: dict[str, Tensor] = {}
        for name, layer in layers.items():
            record, found = measure_step(layer, x, gradient, choices)
            expected = expected or found
            assert_close(found, expected, "layout", name=f"{name} against {case.systems[0]}")
            if number >= 0:
                rounds.append({"system": name, "round": number, **record, "products_cpu_seconds": spent})
    transfers = {name: layer.transfer_alone() for name, layer in layers.items()}
    setup["load_average"].append(os.getloadavg()[0])
    return {"setup": setup, "rounds": rounds, "transfer_seconds": transfers}


def measure_step(layer: PlacedLayer, x: Tensor, gradient: Tensor, choices: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One step. Returns its figures and, to be compared, this rank's output and gradients.

    Figures by rank: ``seconds``, ``cpu_seconds``, ``waited`` (seconds by kind of collective) and ``bytes`` (by kind and tier
    of link); of the layer: ``rank_max_over_mean``, ``copies``, ``copies_max``, ``prediction_error``, ``modelled_seconds``.
    """
    x = x.clone().requires_grad_()
    output: list[Tensor] = []
    traffic.clear()
    figures: dict[str, Any] = timed(lambda: output.append(layer.step(x, gradient, choices)))
    by_rank = gather({**figures, "waited": dict(traffic.waited), "bytes": traffic.by_name()})
    record = {key: [values[key] for values in by_rank] for key in by_rank[0]}
    record = {**record, **layer.figures.values, "modelled_seconds": layer.modelled_seconds()}
    gradients = {f"gradient {i}": g for i, g in enumerate(layer.take_gradients())}
    assert x.grad is not None
    return record, {"output": output[0], "input gradient": x.grad, **gradients}


# Reporting


def of_system(result: dict[str, Any], name: str, figure: Callable[[dict[str, Any]], float]) -> list[float]:
    """A figure of each round."""
    return [figure(record) for record in result["rounds"] if record["system"] == name]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """``median (min-max)``"""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(path: Path, results: Iterable[dict[str, Any]], report: str) -> None:
    """JSON lines (for each result its setup, its rounds, its transfers) to ``path``, the report beside it as Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for result in results:
        lines += [{"setup": result["setup"]}, *result["rounds"], {"transfer_seconds": result["transfer_seconds"]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    path.with_suffix(".md").write_text(report + "\n", encoding="utf-8")


def describe(setup: dict[str, Any]) -> str:
    """What was measured, in a few lines."""
    nodes = max(setup["nodes"]) + 1
    sizes = "T={tokens} per rank, D={hidden}, F={width}, E={experts}, K={top_k}, float32, window of {window} products".format(**setup)
    sizes += "".join(f", {name}={setup[name]}" for name in ("extra_slots", "overlap_degree") if setup[name] is not None)
    committed = "as committed" if setup["trace_is_committed"] else f"sha256 {setup['trace_sha256'][:12]}"
    cluster = setup["cluster"]
    return (
        f"{len(setup['nodes'])} ranks on {nodes} node{'s' * (nodes > 1)}; {sizes}; forward and backward, {setup['rounds']} interleaved "
        f"rounds after {setup['warmup']}. Trace {setup['trace']} ({committed}): busiest rank {setup['rank_imbalance']:.2f} times the mean "
        f"when experts stay with their owners. Planners assume {cluster['inter_bandwidth'] / 1e6:.1f} MB/s between nodes and "
        f"{cluster['flops'] / 1e9:.0f} GFLOP/s per rank. {setup['cores']} cores, load average "
        f"{' to '.join(f'{load:.1f}' for load in setup['load_average'])}, torch {setup['torch']}."
    )
