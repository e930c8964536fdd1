"""The root configuration of a training run: one dataclass per section, and the rules that cross sections.

Components (model, router, ...) define their own configuration beside their code; here are only the sections of
the run itself. Nothing below the trainer sees the root.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from moetrain.config import Component, setting
from moetrain.errors import Problem
from moetrain.models.common.decoder import NOT_CAUSAL
from moetrain.moe.experts.zero import count_zero_experts
from moetrain.moe.mixers import ResidualConfig


@dataclass(kw_only=True)
class RunSection:
    """Where a run lives."""

    name: str | None = setting(None, doc="name of the run; default: the model's name and a hash of the configuration")
    dir: str | None = setting(None, doc="run folder; default: <run.root>/<run.name>")
    root: str = setting("runs", doc="folder in which runs get their folders")


@dataclass(kw_only=True)
class TrainSection:
    """How long and on how much data to train."""

    steps: int = setting(doc="optimizer steps", ge=1)
    seed: int = setting(0, doc="seed of initial weights, data order and noise", ge=0)
    dtype: Literal["float32", "bfloat16", "float64"] = setting("float32", doc="dtype of computation; bfloat16 keeps float32 master weights")
    global_batch_size: int = setting(doc="sequences per optimizer step, over all ranks", ge=1)
    micro_batch_size: int | None = setting(
        None, doc="sequences per data-parallel rank and forward pass; default: global_batch_size / those ranks", ge=1
    )
    recompute: bool = setting(False, doc="activation checkpointing of every block (the routing decision is stored, not recomputed)")
    max_skipped_steps: int = setting(20, doc="give up after this many steps in a row with non-finite gradients", ge=1)
    threads: int | None = setting(None, doc="CPU threads per rank; default: $OMP_NUM_THREADS, else cores / ranks on this machine", ge=1)
    keep_freed_memory: bool = setting(
        True, doc="on CPU: freed memory stays with the process for its next tensors, which saves clearing new pages (glibc's mallopt)"
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", doc="auto takes a GPU if there is one")


@dataclass(kw_only=True)
class CheckpointSection:
    """When to save, what to keep, where to resume from."""

    every_steps: int = setting(50, doc="steps between checkpoints; one is always written at the end", ge=1)
    keep: int = setting(2, doc="complete checkpoints to keep", ge=1)
    resume: str = setting("auto", doc="auto: continue the run in run.dir; never: start afresh; or a run or checkpoint folder to start from")
    async_save: bool = setting(False, doc="write in the background while training goes on")


@dataclass(kw_only=True)
class MetricsSection:
    """What is measured and how often it is written."""

    every_steps: int = setting(1, doc="steps between lines of metrics.jsonl", ge=1)
    trace_routing: bool = setting(
        False, doc="write the loads of each step, by layer, rank and expert, to traces/loads.jsonl (layouts that place experts)"
    )
    profile_step: int | None = setting(
        None, doc="first step to trace with torch.profiler, to traces/rank<r>.json.gz, which opens in Perfetto; default: none", ge=1
    )
    profile_steps: int = setting(3, doc="steps to trace from metrics.profile_step on", ge=1)
    eval_every_steps: int | None = setting(None, doc="steps between held-out evaluations; default: only after the last step", ge=1)
    eval_batches: int = setting(
        8, doc="held-out batches of train.global_batch_size sequences per evaluation; fewer if the data has fewer", ge=1
    )


@dataclass(kw_only=True)
class LoggingSection:
    """Where metrics go besides metrics.jsonl. A sink that fails never stops training."""

    wandb: Literal["off", "offline", "online"] = setting("off", doc="Weights & Biases (extra: wandb)")
    wandb_project: str = setting("moetrain", doc="Weights & Biases project")
    tensorboard: bool = setting(False, doc="TensorBoard event files in the run folder (extra: tensorboard)")
    display: Literal["auto", "rich", "plain", "none"] = setting("auto", doc="progress: rich on a terminal, else one line per step")
    sample_prompt: str | None = setting("def ", doc="text that the trained model continues at the end; null: no sample")


@dataclass(kw_only=True)
class LaunchSection:
    """How many processes to start; ignored under torchrun, which has started them already."""

    nproc_per_node: int = setting(1, doc="processes on this machine", ge=1)
    nnodes: int = setting(1, doc="machines; more than one needs torchrun or SLURM to start the others", ge=1)
    timeout_seconds: float = setting(600.0, doc="a collective that takes longer is an error", gt=0)


@dataclass(kw_only=True)
class Config:
    """Everything that describes a run."""

    run: RunSection
    train: TrainSection
    model: Any = setting(doc="architecture and sizes", group="model")
    router: Any = setting(doc="which experts a token takes", group="router")
    capacity: Any = setting(doc="how many tokens an expert takes", group="capacity")
    experts: Any = setting(doc="what an expert computes", group="experts")
    loss: dict[str, Component] = setting(default_factory=dict, doc="auxiliary losses by name", group="loss")
    dropout: dict[str, Component] = setting(default_factory=dict, doc="dropout of routes by name", group="dropout")
    mixer: Any = setting(default_factory=ResidualConfig, doc="how the output of an MoE layer enters the residual stream", group="mixer")
    objective: Any = setting(doc="what is optimised on which batch", group="objective")
    data: Any = setting(doc="text, tokenizer, packing", group="data")
    optim: Any = setting(doc="optimizer", group="optim")
    schedule: Any = setting(doc="learning-rate schedule", group="schedule")
    parallel: Any = setting(doc="layout over ranks", group="parallel")
    checkpoint: CheckpointSection
    metrics: MetricsSection
    logging: LoggingSection
    launch: LaunchSection

    def problems(self, path: str) -> Iterable[Problem]:
        """Rules across sections that hold for any number of ranks."""
        experts, top_k = self.experts.num_experts, getattr(self.router, "top_k", None)
        columns = experts + count_zero_experts(self.router)
        if top_k is not None and top_k > columns:
            known = f"experts.num_experts ({experts})" if columns == experts else f"the {columns} experts and zero-computation experts"
            yield Problem("router.top_k", top_k, f"must be <= {known}")
        if not getattr(self.router, "causal", True):
            yield Problem("router", self.router.kind, NOT_CAUSAL)
        if not getattr(self.router, "scored", True):
            for name, loss in self.loss.items():
                yield Problem(f"loss.{name}", loss.kind, f"router={self.router.kind} has no probabilities to act on; loss=[] removes all")
        yield from self.spawn_problems()
        if self.metrics.profile_step is not None and self.metrics.profile_step > self.train.steps:
            yield Problem("metrics.profile_step", self.metrics.profile_step, f"must be <= train.steps ({self.train.steps})")
        if hasattr(self.router, "check"):
            yield from self.router.check("router", num_experts=experts)
        for name, loss in self.loss.items():
            if hasattr(loss, "check"):
                yield from loss.check(f"loss.{name}", num_experts=experts, router=self.router)
        if hasattr(self.capacity, "check"):
            yield from self.capacity.check("capacity", num_experts=experts, router=self.router)

    def spawn_step(self) -> int | None:
        """Steps after which experts are spawned from one; None if they are there from the start."""
        spawn = getattr(self.experts, "spawn", None)
        return None if spawn is None else spawn.step(self.train.steps)

    def spawn_problems(self) -> Iterable[Problem]:
        """What stands against spawning experts."""
        step = self.spawn_step()
        if step is None:
            return
        path, after = "experts.spawn.after", self.experts.spawn.after
        if step >= self.train.steps:
            yield Problem(path, after, f"must leave the experts at least one step of train.steps ({self.train.steps})")
        if self.experts.num_experts < 2:
            yield Problem("experts.num_experts", self.experts.num_experts, f"must be >= 2 with {path}: one expert has none to become")
        if not isinstance(self.mixer, ResidualConfig):
            yield Problem("mixer", self.mixer.kind, f"must be residual with {path}: other rules need MoE layers from the start")

    def layout_problems(self, world_size: int) -> Iterable[Problem]:
        """Rules that depend on how many ranks there are."""
        yield from self.parallel.check("parallel", world_size=world_size, num_experts=self.experts.num_experts)
        yield from self.tensor_problems()
        batch, micro = self.train.global_batch_size, self.train.micro_batch_size
        ranks = max(1, world_size // self.parallel.tensor)
        if batch % ranks:
            yield Problem("train.global_batch_size", batch, f"must be divisible by the {ranks} data-parallel ranks")
        elif micro is not None and (batch // ranks) % micro:
            yield Problem(
                "train.micro_batch_size",
                micro,
                f"must divide the {batch // ranks} sequences that each of {ranks} data-parallel ranks has per step",
            )

        tokens = self.micro_batch_size(ranks) * self.data.seq_len
        if tokens % self.parallel.tensor:
            yield Problem("parallel.tensor", self.parallel.tensor, f"must divide the {tokens} tokens of a micro-batch")
        for path, component in {"capacity": self.capacity, **{f"loss.{name}": loss for name, loss in self.loss.items()}}.items():
            groups = getattr(component, "num_groups", 1)
            if tokens % groups:
                yield Problem(f"{path}.num_groups", groups, f"must divide the {tokens} tokens of a rank's micro-batch")

    def tensor_problems(self) -> Iterable[Problem]:
        """What the ranks that split a matrix, or an expert, must divide."""
        for name in ("num_heads", "num_kv_heads"):
            heads = getattr(self.model, name, None)
            if heads is not None and heads % self.parallel.tensor:
                yield Problem("parallel.tensor", self.parallel.tensor, f"must divide model.{name} ({heads})")
        width = getattr(self.experts, "width", None)
        if width is not None and width % self.parallel.expert_tensor:
            yield Problem("parallel.expert_tensor", self.parallel.expert_tensor, f"must divide experts.width ({width})")

    def micro_batch_size(self, data_ranks: int) -> int:
        """Sequences per forward pass. data_ranks: data-parallel ranks."""
        return self.train.micro_batch_size or self.train.global_batch_size // data_ranks
