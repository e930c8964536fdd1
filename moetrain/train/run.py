"""Training one run on one rank, from data to the last checkpoint. Reads top to bottom."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moetrain.config import dump
from moetrain.data import PackedSequences, PreparedData, prepare
from moetrain.errors import CheckpointError, ConfigError, Problem, TrainingError
from moetrain.models.common.channel import OneExpert
from moetrain.models.common.decoder import Decoder
from moetrain.moe.layer import MoEParts
from moetrain.parallel.collectives import traffic
from moetrain.parallel.parallelize import ParallelModel, parallelize
from moetrain.parallel.placement.scheduler import LayerFigures
from moetrain.parallel.ranks import Ranks
from moetrain.parallel.reshard import reshard, restore_placement
from moetrain.train import checkpoint, faults
from moetrain.train.checkpoint import Checkpointer
from moetrain.train.data import BatchPlan
from moetrain.train.display import Display
from moetrain.train.events import SPAWN, has_one_expert, spawn_experts, spawned_after
from moetrain.train.flops import FlopCounter, count_parameters, peak_flops
from moetrain.train.metrics import MetricsFile, Phases, Recorder, open_sinks
from moetrain.train.optim import set_learning_rate
from moetrain.train.settings import Config
from moetrain.train.state import Progress, all_tensors, set_update_count
from moetrain.train.step import Objective, StepResult, accumulate_gradients, count_units, evaluate_loss
from moetrain.train.trace import Tracer

log = logging.getLogger(__name__)
Stop = Callable[[], int | None]


def run_training(
    config: Config, ranks: Ranks, run_dir: Path, *, data: PreparedData | None = None, stop: Stop = lambda: None
) -> dict[str, Any]:
    """Train until ``train.steps``, or until ``stop()`` returns a signal number on any rank.

    data: what ``prepare(config.data)`` gave, if the caller has it already. The process group must exist if there are
    several ranks. Returns the status ("complete" or "interrupted"), the last step, the signal and, on completion, the
    held-out loss.
    """
    trainer = Trainer.start(config, ranks, run_dir, data or prepare(config.data))
    with trainer:
        trainer.resume()
        while trainer.progress.step < config.train.steps:
            trainer.tracer.begin(trainer.progress.step + 1)
            signal = trainer.train_step(stop)
            trainer.tracer.end(trainer.progress.step)
            if signal:
                trainer.save()
                return {"status": "interrupted", "step": trainer.progress.step, "signal": signal, "run_dir": str(run_dir)}
        trainer.save()
        return {"status": "complete", "step": trainer.progress.step, "run_dir": str(run_dir), **trainer.summary()}


def build_model(config: Config, vocab_size: int, *, one_expert: bool = False) -> Decoder:
    """The model of a run on the meta device. one_expert: as it is before its experts are spawned."""
    names = ("router", "experts", "capacity", "loss", "dropout", "mixer")
    parts = MoEParts(**{name: getattr(config, name) for name in names}, one_expert=one_expert)
    with torch.device("meta"):
        model: Decoder = config.model.build(parts, vocab_size=vocab_size, dtype=getattr(torch, config.train.dtype))
    if one_expert and not any(isinstance(module, OneExpert) for module in model.modules()):
        raise ConfigError([Problem("experts.spawn.after", config.experts.spawn.after, "must be 0: the model has no MoE layers")])
    return model


def place_model(
    config: Config, ranks: Ranks, vocab_size: int, *, one_expert: bool
) -> tuple[ParallelModel, torch.optim.Optimizer, FlopCounter, int]:
    """The model in its layout with initial weights, its optimizer, and its number of parameters. Collective."""
    layout = config.parallel.resolve(ranks.world_size, timeout_seconds=config.launch.timeout_seconds)
    model = build_model(config, vocab_size, one_expert=one_expert)
    flops, size = FlopCounter(model), count_parameters(model)
    placed = parallelize(
        model,
        layout,
        ranks,
        device=ranks.device(config.train.device),
        recompute=config.train.recompute,
        tokens_per_pass=config.micro_batch_size(layout.data_world_size) * config.data.seq_len,
    )
    placed.initialise(config.train.seed)
    placed.model.train()
    return placed, config.optim.build(placed), flops, size


@dataclass
class Trainer:
    """Everything that lives for the length of a run on one rank."""

    config: Config
    ranks: Ranks
    run_dir: Path
    data: PreparedData
    plan: BatchPlan
    evaluation: BatchPlan | None
    placed: ParallelModel
    optimizer: torch.optim.Optimizer
    objective: Objective
    flops: FlopCounter
    checkpointer: Checkpointer
    progress: Progress
    display: Display
    tracer: Tracer
    recorder: Recorder | None = None
    traces: MetricsFile | None = None
    last_evaluation: dict[str, float] | None = None
    saved_step: int = -1
    events: list[dict[str, Any]] = field(default_factory=list)
    """Boundary events so far: name, and steps that were done."""

    @classmethod
    def start(cls, config: Config, ranks: Ranks, run_dir: Path, data: PreparedData) -> Trainer:
        """Build and place the model, allocate the optimizer."""
        check_vocabulary(config, data)
        placed, optimizer, flops, size = place_model(config, ranks, data.vocab_size, one_expert=has_one_expert(config, []))
        layout = placed.layout
        micro = config.micro_batch_size(layout.data_world_size)

        def plan(tokens: Any) -> BatchPlan:
            sequences = PackedSequences(tokens, seq_len=config.data.seq_len, eos_id=data.eos_id, mask_documents=config.data.mask_documents)
            return BatchPlan(sequences, config.train.seed, config.train.global_batch_size, micro, ranks.data_parallel(layout.tensor))

        display = Display.open(config.logging.display if ranks.is_main else "none", total=config.train.steps)
        display.say(
            f"{config.model.kind}: {size / 1e6:.2f}M parameters, vocabulary {data.vocab_size}; layout {layout.name} on "
            f"{ranks.world_size} rank(s), {placed.device.type}, {config.train.dtype}; run folder {run_dir}"
        )
        return cls(
            config=config,
            ranks=ranks,
            run_dir=run_dir,
            data=data,
            plan=plan(data.train),
            evaluation=plan(data.evaluation) if data.evaluation.tokens.size > 1 else None,
            placed=placed,
            optimizer=optimizer,
            objective=config.objective.build(),
            flops=flops,
            checkpointer=Checkpointer(run_dir / "checkpoints", keep=config.checkpoint.keep, async_save=config.checkpoint.async_save),
            progress=Progress(),
            display=display,
            tracer=Tracer(
                run_dir / "traces" / f"rank{ranks.rank}.json.gz", first=config.metrics.profile_step, steps=config.metrics.profile_steps
            ),
        )

    def resume(self) -> None:
        """Load the newest good checkpoint of this run, or the one that checkpoint.resume names; open the metrics file."""
        own = checkpoint.newest_good(self.run_dir / "checkpoints")
        path = own or starting_checkpoint(self.config.checkpoint.resume)
        if path is not None:
            info = checkpoint.read_info(path).info
            self.events = info.get("events", [])
            if spawned_after(self.events) is not None:
                self.placed, self.optimizer, self.flops, _ = place_model(self.config, self.ranks, self.data.vocab_size, one_expert=False)
            if own:
                restore_placement(self.placed, self.optimizer, info.get("placement", {}))
            checkpoint.load(path, all_tensors(self.placed, self.optimizer), complete=True, verified=True)
            if info["data"] != self.data.content_hash:
                raise CheckpointError(f"{path} was trained on other data (content {info['data'][:8]}, now {self.data.content_hash[:8]})")
            self.progress = Progress.from_info(info)
            set_update_count(self.optimizer, self.progress.updates)
            self.saved_step = self.progress.step if own else -1
            self.display.say(f"continuing after step {self.progress.step} from {path}")
        if self.ranks.is_main:
            self.data.save_tokenizer(self.run_dir)
            file = MetricsFile(self.run_dir / "metrics.jsonl", resumed_step=self.progress.step)
            self.recorder = Recorder(file, open_sinks(self.config.logging, self.run_dir, dump(self.config)))
            if self.config.metrics.trace_routing:
                self.traces = MetricsFile(self.run_dir / "traces" / "loads.jsonl", resumed_step=self.progress.step)

    def train_step(self, stop: Stop) -> int | None:
        """One optimizer step with its metrics, evaluation and checkpoint. If a signal has reached any rank, all return
        its number instead and nothing is done."""
        config, progress, phases = self.config, self.progress, Phases()
        started = time.perf_counter()
        faults.point("step.begin", step=progress.step + 1)
        with phases("data"):
            batches = self.plan.training_batches(progress.position)
        with phases("agree"):
            requested = stop()
            flags = [int(self.checkpointer.pending_done()), *(int(number == requested) for number in range(1, 32))]
            totals, (done, *votes) = count_units(batches, self.placed, flags=flags)
        if done == self.ranks.world_size:
            self.checkpointer.commit()
        if any(votes):
            return next(number for number, count in enumerate(votes, start=1) if count)
        if has_one_expert(config, self.events) and progress.step >= (config.spawn_step() or 0):
            with phases("events"):
                self.spawn()
                gc.collect()  # modules and their hooks are cycles, which would keep the former state in memory
        first = spawned_after(self.events) or 0  # what routers schedule begins when there are routers
        for layer in self.placed.model.moe_layers().values():
            layer.router.begin_step(progress.step - first, config.train.steps - first)
        self.placed.begin_step()
        self.optimizer.zero_grad(set_to_none=True)
        result = accumulate_gradients(
            self.placed,
            self.objective,
            batches,
            totals,
            seed=config.train.seed,
            step=progress.step,
            total_steps=config.train.steps,
            phases=phases,
        )
        with phases("optimizer"):
            lr, norm, skipped = self.update(result)
        progress.step += 1
        with phases("placement"):
            placement = self.placed.end_step(result.statistics)
            self.trace(placement)
            moved = reshard(self.placed, self.optimizer, progress.step)
        sent, waited = traffic.by_name(), dict(traffic.waited)  # before an evaluation adds its own
        progress.position += config.train.global_batch_size
        with phases("evaluation"):
            self.maybe_evaluate()
        seconds = time.perf_counter() - started
        traffic.clear()
        communication = {
            "bytes_sent": sent,
            **({"seconds_waited": waited} if waited else {}),
            **({"experts_moved": moved} if moved else {}),
        }
        self.record(result, placement, communication, phases, lr=lr, norm=norm, skipped=skipped, seconds=seconds)
        if progress.step % config.checkpoint.every_steps == 0:
            self.save()
        if progress.skipped_in_a_row >= config.train.max_skipped_steps:
            raise TrainingError(
                f"gave up at step {progress.step}: the gradients of {progress.skipped_in_a_row} steps in a row were not finite "
                f"(train.max_skipped_steps = {config.train.max_skipped_steps})"
            )
        return None

    def spawn(self) -> None:
        """The boundary event in which one FFN per MoE layer becomes router and experts. Collective."""
        config, step = self.config, self.progress.step
        placed, optimizer, flops, size = place_model(config, self.ranks, self.data.vocab_size, one_expert=False)
        old, new = all_tensors(self.placed, self.optimizer), all_tensors(placed, optimizer)
        spawn_experts(old, new, config.experts.spawn, seed=config.train.seed)
        set_update_count(optimizer, self.progress.updates)
        faults.point("event.spawn", step=step)
        self.placed, self.optimizer, self.flops = placed, optimizer, flops
        self.events = [*self.events, {"name": SPAWN, "step": step}]
        self.display.say(f"after step {step} one expert became {config.experts.num_experts}: {size / 1e6:.2f}M parameters")

    def update(self, result: StepResult) -> tuple[float, float, bool]:
        """Clip and apply the gradients, then update selection biases; or skip the step altogether if loss or gradients
        are not finite. All ranks decide alike, since norm and loss are global. Returns (lr, gradient norm, skipped)."""
        config, progress = self.config, self.progress
        lr = config.optim.lr * config.schedule.factor(progress.updates, config.train.steps)
        norm = self.placed.clip_gradients(config.optim.clip_norm).item()
        if not (torch.isfinite(torch.tensor([norm, result.loss])).all()):
            progress.skipped_in_a_row += 1
            return lr, norm, True
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        for name, layer in self.placed.model.moe_layers().items():
            layer.router.end_step(result.statistics[name])
        progress.updates += 1
        if self.placed.frozen_routers():
            set_update_count(self.optimizer, progress.updates)  # theirs too, as when a run is resumed
        progress.skipped_in_a_row = 0
        return lr, norm, False

    def maybe_evaluate(self) -> None:
        """Held-out loss after every metrics.eval_every_steps steps and after the last step."""
        every, step = self.config.metrics.eval_every_steps, self.progress.step
        self.last_evaluation = None
        if self.evaluation is not None and (step == self.config.train.steps or (every and step % every == 0)):
            batches = self.evaluation.evaluation_batches(self.config.metrics.eval_batches)
            loss, tokens = evaluate_loss(self.placed, self.objective, batches)
            self.last_evaluation = {"eval_loss": loss, "eval_tokens": tokens}

    def trace(self, placement: Mapping[str, LayerFigures]) -> None:
        """With metrics.trace_routing: a line of traces/loads.jsonl with the loads of this step by layer, rank and expert."""
        if self.traces is not None and placement:
            loads = {name: figures.counts.tolist() for name, figures in placement.items()}
            self.traces.write({"step": self.progress.step, "loads": loads})

    def record(
        self,
        result: StepResult,
        placement: Mapping[str, LayerFigures],
        communication: Mapping[str, Any],
        phases: Phases,
        *,
        lr: float,
        norm: float,
        skipped: bool,
        seconds: float,
    ) -> None:
        """Write this step's line (main rank) and show it."""
        layers = self.placed.model.moe_layers()
        rows = {name: int(layer.dispatched[: layers[name].experts.num_experts].sum()) for name, layer in result.statistics.items()}
        flops = self.flops.step(result.tokens, self.config.data.seq_len, rows) / max(1e-9, seconds - phases.seconds.get("evaluation", 0.0))
        if self.recorder is None:
            return
        training_seconds = seconds - phases.seconds.get("evaluation", 0.0)
        events = [event["name"] for event in self.events if event["step"] == self.progress.step - 1]
        line: dict[str, Any] = {
            "step": self.progress.step,
            "loss": result.loss,
            "loss_total": result.loss_total,
            "grad_norm": norm,
            "lr": lr,
            "tokens": result.tokens,
            "tokens_per_second": result.tokens / training_seconds,
            "step_seconds": training_seconds,
            "model_flops_per_second": flops,
            "skipped": skipped,
            "position": self.progress.position,
            **({"terms": result.terms} if result.terms else {}),
            **(self.last_evaluation or {}),
            **({"events": events} if events else {}),
            "seconds": {k: v for k, v in phases.seconds.items() if k != "evaluation" or self.last_evaluation},
            **communication,
            "experts": {
                name: balance(layer) | (placement[name].values if name in placement else {}) for name, layer in result.statistics.items()
            },
        }
        peak = peak_flops(self.placed.device)
        if peak is not None:
            line["model_flops_utilisation"] = flops / (peak * self.ranks.world_size)
            line["memory_peak_bytes"] = torch.cuda.max_memory_allocated(self.placed.device)
        last = self.progress.step == self.config.train.steps
        if self.progress.step % self.config.metrics.every_steps == 0 or last or events or self.last_evaluation:
            self.recorder.write(line)
        self.display.step(line)

    def save(self) -> None:
        """Write a checkpoint of the current step, unless it is the one that was loaded or written last."""
        if self.saved_step == self.progress.step:
            return
        info = {
            **self.progress.to_info(),
            "data": self.data.content_hash,
            "seed": self.config.train.seed,
            "placement": self.placed.placement_state(),
            "events": self.events,
        }
        self.checkpointer.save(self.progress.step, all_tensors(self.placed, self.optimizer), info)
        self.saved_step = self.progress.step

    def summary(self) -> dict[str, Any]:
        """Final held-out loss, evaluated again if the run was complete already."""
        if self.last_evaluation is None:
            self.maybe_evaluate()
        return dict(self.last_evaluation or {})

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Wait for a checkpoint in flight (not after an error: other ranks may be gone), close files."""
        try:
            if kind is None:
                self.checkpointer.finish()
                self.tracer.close()
        finally:
            self.checkpointer.close()
            self.display.close()
            for file in (self.recorder, self.traces):
                if file is not None:
                    file.close()


def balance(layer: Any) -> dict[str, Any]:
    """Balance figures of one MoE layer: the heaviest expert's load over the mean, share of dropped choices, experts
    without tokens, mean entropy of the router (nats), and the load of each expert."""
    selected, dispatched = layer.selected.double(), layer.dispatched.sum().item()
    total = selected.sum().item()
    return {
        "max_over_mean": (selected.max() / selected.mean()).item() if total else 0.0,
        "dropped": 1.0 - dispatched / total if total else 0.0,
        "idle": int((layer.selected == 0).sum()),
        "entropy": (layer.entropy / layer.tokens.clamp_min(1)).item(),
        "load": layer.selected.tolist(),
    }


def check_vocabulary(config: Config, data: PreparedData) -> None:
    """A model may have more rows than the tokenizer has tokens, but not fewer."""
    size = getattr(config.model, "vocab_size", None)
    if size is not None and size < data.vocab_size:
        raise ConfigError([Problem("model.vocab_size", size, f"must be >= the tokenizer's {data.vocab_size}")])


def starting_checkpoint(resume: str) -> Path | None:
    """The checkpoint that checkpoint.resume=<folder> means; None for auto and never."""
    if resume in ("auto", "never"):
        return None
    folder = Path(resume).expanduser()
    if (folder / "manifest.json").exists():
        checkpoint.verify(folder)
        return folder
    path = checkpoint.newest_good(folder / "checkpoints")
    if path is None:
        raise CheckpointError(f"checkpoint.resume = {resume!r}: neither a checkpoint nor a run folder that holds one")
    return path
