"""What each way of placing experts would do for a model, a cluster and a trace of loads: ``moetrain plan``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from moetrain.config import setting
from moetrain.data.sources import TRAINED
from moetrain.data.tokenizers import ByteTokenizer, load_tokenizer
from moetrain.errors import ConfigError, Problem
from moetrain.parallel.layouts import FSSDPConfig, FSSDPSettings
from moetrain.parallel.placement.cost import LayerCost, Transport
from moetrain.parallel.placement.plan import Cluster
from moetrain.parallel.scheduling import layer_cost
from moetrain.simulate.clusters import ClusterName, named_cluster
from moetrain.simulate.model import ModelSizes
from moetrain.simulate.replay import Replay, replay
from moetrain.simulate.report import PlanReport
from moetrain.simulate.strategies import Strategy, strategies
from moetrain.simulate.traces import SYNTHETIC, Trace, read_trace, synthetic_trace
from moetrain.train.run import build_model
from moetrain.train.settings import Config


@dataclass(kw_only=True)
class PlanSettings:
    """What each way of placing experts would do: balance, traffic, modelled time and memory.

    The model is that of a run (run=DIR), or what overrides as for `moetrain train` describe: model=deepseek_moe_16b.
    A step is one forward and one backward pass of every rank; all ranks share the experts.
    """

    run: str | None = setting(None, doc="run folder whose model and trace to take; default: the configuration of the overrides")
    trace: str | None = setting(
        None, doc=f"loads.jsonl[.gz] of a run with metrics.trace_routing, or {SYNTHETIC}; default: the run's own, or zipf:1.2"
    )
    steps: int = setting(20, doc="steps of a synthetic trace", ge=2)
    tokens_per_rank: int | None = setting(
        None, doc="tokens of a rank's pass, to which loads are scaled; default: those of the trace, or of the configuration", ge=1
    )
    cluster: ClusterName = setting("here", doc="what the settings below start from; here: this machine with launch.nproc_per_node ranks")
    nodes: int | None = setting(None, doc="nodes", ge=1)
    ranks_per_node: int | None = setting(None, doc="ranks on each node", ge=1)
    intra_bandwidth: float | None = setting(None, doc="bytes/s from a rank to others of its node", gt=0)
    inter_bandwidth: float | None = setting(None, doc="bytes/s from a node to others", gt=0)
    latency: float | None = setting(None, doc="seconds per collective", ge=0)
    flops: float | None = setting(None, doc="FLOP/s of a rank in expert computation", gt=0)
    memory: float | None = setting(None, doc="bytes of a rank", gt=0)
    mixer_seconds: float | None = setting(
        None, doc="of work before a MoE layer that hides transfers, twice that backward; default: from the mixer's FLOPs", ge=0
    )
    extra_slots: int | None = setting(None, doc="copies that a rank has room for in each layer; default: parallel.fssdp's", ge=0)
    overlap_degree: int | None = setting(None, doc="experts that Algorithm 1 may copy; default: what the mixer hides", ge=0)
    transport: Transport | None = setting(None, doc="of copies; default: parallel.fssdp's")
    reshard_every: int = setting(10, doc="steps between new owners (Algorithm 2) and new placements of EPLB", ge=1)
    json: str | None = setting(None, doc="file for all figures")


def main(settings: PlanSettings, config: Config) -> PlanReport:
    """Compare all strategies. config: of the run that the settings name, or of one that is yet to be.

    Raises ConfigError naming the setting that does not fit the others.
    """
    sizes = ModelSizes.of(build_model(config, vocab_size(settings, config)))
    if not sizes.layers:
        raise ConfigError([Problem("model", config.model.kind, "has no MoE layers")])
    alone = [name for name in ("tensor", "expert_tensor", "replicate") if getattr(config.parallel, name) != 1]
    if alone:
        raise ConfigError([Problem(f"parallel.{name}", getattr(config.parallel, name), "is not simulated: must be 1") for name in alone])
    cluster, memory = described_cluster(settings, config)
    base = config.parallel.fssdp if isinstance(config.parallel, FSSDPConfig) else FSSDPSettings()
    given = {name: getattr(settings, name) for name in ("extra_slots", "overlap_degree", "transport")}
    fssdp = replace(base, **{name: value for name, value in given.items() if value is not None})
    trace, tokens = described_trace(settings, config, sizes, cluster.num_ranks)
    warm_up = fssdp.window
    if trace.num_steps <= warm_up:
        field = "trace" if settings.steps > warm_up else "steps"
        raise ConfigError([Problem(field, trace.num_steps, f"must be more than {warm_up} steps: the first are history for predictions")])
    compared = strategies(fssdp, reshard_every=settings.reshard_every, num_groups=getattr(config.router, "num_groups", 1))
    replays = simulate(compared, trace, sizes, cluster, tokens_per_rank=tokens, warm_up=warm_up, mixer_seconds=settings.mixer_seconds)
    return PlanReport(
        model=config.model.kind,
        parameters=sizes.root + sum(sizes.blocks) + sizes.num_experts * sum(sizes.expert_parameters),
        expert_parameters=sizes.num_experts * sum(sizes.expert_parameters),
        trace=trace.name,
        steps=trace.num_steps - warm_up,
        warm_up=warm_up,
        tokens_per_rank=tokens,
        reshard_every=settings.reshard_every,
        cluster=cluster,
        memory=memory,
        replays=replays,
    )


def simulate(
    compared: list[Strategy],
    trace: Trace,
    sizes: ModelSizes,
    cluster: Cluster,
    *,
    tokens_per_rank: int,
    warm_up: int,
    mixer_seconds: float | None = None,
) -> list[Replay]:
    """Replay a trace, made for the ranks of the cluster, under each strategy. Layers of the model take those of the trace
    in turn."""
    counts = trace.counts[:, [layer % len(trace.layers) for layer in range(len(sizes.layers))]]

    def costs(strategy: Strategy) -> list[LayerCost]:
        made = [
            layer_cost(
                layer.experts,
                sizes.hidden_size,
                sizes.dtype,
                strategy.settings,
                mixer_flops=2.0 * tokens_per_rank * layer.mixer_parameters,
                cluster=cluster,
            )
            for layer in sizes.layers
        ]
        if mixer_seconds is None:
            return made
        return [replace(cost, hidden_forward=mixer_seconds, hidden_backward=2 * mixer_seconds) for cost in made]

    return [replay(strategy, counts, sizes, costs(strategy), cluster, warm_up=warm_up) for strategy in compared]


def vocab_size(settings: PlanSettings, config: Config) -> int:
    """Tokens of the model's vocabulary, without reading training data."""
    if getattr(config.model, "vocab_size", None):
        return config.model.vocab_size
    if settings.run is not None:
        return load_tokenizer(Path(settings.run).expanduser()).vocab_size
    if config.data.tokenizer in TRAINED:
        return config.data.vocab_size if config.data.tokenizer == "bpe" else ByteTokenizer.vocab_size
    return load_tokenizer(config.data.tokenizer).vocab_size


def described_cluster(settings: PlanSettings, config: Config) -> tuple[Cluster, float | None]:
    """The cluster and the memory of a rank in bytes."""
    ranks_per_node = settings.ranks_per_node or (config.launch.nproc_per_node if settings.cluster == "here" else None)
    cluster, memory = named_cluster(settings.cluster, nodes=settings.nodes, ranks_per_node=ranks_per_node)
    if cluster.num_ranks == 1:
        raise ConfigError([Problem("ranks_per_node", 1, "one rank has nothing to choose; give nodes, ranks_per_node or cluster=h100")])
    given = {name: getattr(settings, name) for name in ("intra_bandwidth", "inter_bandwidth", "latency", "flops")}
    cluster = replace(cluster, **{name: value for name, value in given.items() if value is not None})
    return cluster, settings.memory or memory


def described_trace(settings: PlanSettings, config: Config, sizes: ModelSizes, ranks: int) -> tuple[Trace, int]:
    """The trace on this many ranks, and tokens of a rank's pass."""
    name = settings.trace or ("zipf:1.2" if settings.run is None else str(Path(settings.run) / "traces" / "loads.jsonl"))
    top_k = getattr(config.router, "top_k", None) or config.model.top_k
    sequences = config.train.micro_batch_size or max(1, config.train.global_batch_size // ranks)
    tokens = settings.tokens_per_rank or sequences * config.data.seq_len
    synthetic = synthetic_trace(
        name, steps=settings.steps, layers=len(sizes.layers), ranks=ranks, experts=sizes.num_experts, tokens=tokens, top_k=top_k
    )
    if synthetic is not None:
        return synthetic, tokens
    recorded = read_trace(Path(name).expanduser())
    if recorded.num_experts != sizes.num_experts:
        raise ConfigError([Problem("trace", name, f"has {recorded.num_experts} experts, the model {sizes.num_experts}")])
    trace = recorded.on(ranks, None if settings.tokens_per_rank is None else settings.tokens_per_rank * top_k)
    per_rank = trace.counts.sum() / (trace.num_steps * len(trace.layers) * ranks)
    return trace, max(1, round(per_rank / top_k))
