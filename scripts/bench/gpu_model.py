"""The models of gpu_parts.py: a small one to compare, and one of the 1B class to train. Needs torch alone."""

from __future__ import annotations

from typing import Any

import torch

from moetrain.models.deepseek_moe import DeepSeekMoEConfig
from moetrain.moe.layer import MoEParts
from moetrain.objectives.batch import Batch
from moetrain.objectives.language_modeling import LanguageModelingConfig
from moetrain.parallel.layouts import Layout
from moetrain.parallel.parallelize import ParallelModel, parallelize
from moetrain.parallel.ranks import Ranks
from moetrain.registry import lookup
from moetrain.train.flops import FlopCounter, count_parameters
from moetrain.train.metrics import Phases
from moetrain.train.optim import AdamWConfig
from moetrain.train.step import accumulate_gradients, count_units

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def moe_parts(num_experts: int, top_k: int, width: int) -> MoEParts:
    return MoEParts(
        router=lookup("router", "topk")(top_k=top_k, renormalise=True),
        experts=lookup("experts", "ffn")(num_experts=num_experts, width=width),
        capacity=lookup("capacity", "none")(),
        loss={"balance": lookup("loss", "expert_balance")(coefficient=0.01)},
    )


def place(config: DeepSeekMoEConfig, dtype: torch.dtype, device: torch.device, vocab_size: int) -> tuple[ParallelModel, FlopCounter, int]:
    with torch.device("meta"):
        model = config.build(moe_parts(config.num_experts, config.top_k, config.expert_width), vocab_size=vocab_size, dtype=dtype)
    flops, size = FlopCounter(model), count_parameters(model)
    placed = parallelize(model, Layout("single", 1, 1), Ranks(), device=device)
    placed.initialise(0)
    return placed, flops, size


def random_batch(batch: int, seq_len: int, vocab_size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (batch, seq_len + 1), generator=generator)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.arange(batch))


def step(placed: ParallelModel, batches: list[Batch]) -> tuple[float, float]:
    """Forward, backward and gradient norm of one step; (loss, norm)."""
    totals, _ = count_units(batches, placed)
    for _, parameter in placed.parameters():
        parameter.grad = None
    objective = LanguageModelingConfig().build()
    result = accumulate_gradients(placed, objective, batches, totals, seed=0, step=0, total_steps=1, phases=Phases())
    return result.loss, placed.clip_gradients(None).item()


class Run:
    """Training of a model of the 1B class with AdamW in bfloat16, on one batch."""

    def __init__(self, size: str) -> None:
        if size == "tiny":
            config = DeepSeekMoEConfig(hidden_size=64, num_layers=2, num_heads=2, head_dim=32, num_experts=8, top_k=2, expert_width=64,
                                       shared_width=64, dense_width=128, init_std=0.02)  # fmt: skip
            vocab_size, self.batches = 256, [random_batch(2, 64, 256)]
        else:  # rows of all matrices are whole vectors, as the fast kernels want them
            config = DeepSeekMoEConfig(hidden_size=1280, num_layers=9, num_heads=10, head_dim=128, num_experts=32, top_k=4,
                                       expert_width=896, shared_width=896, dense_layers=1, dense_width=3584)  # fmt: skip
            vocab_size, self.batches = 32000, [random_batch(8, 2048, 32000)]
        self.placed, self.flops, self.parameters = place(config, torch.bfloat16, DEVICE, vocab_size)
        self.optimizer = AdamWConfig(lr=3e-4).build(self.placed)
        self.objective = LanguageModelingConfig().build()
        self.phases = Phases()

    def step(self, index: int) -> Any:
        """Of training."""
        totals, _ = count_units(self.batches, self.placed)
        self.optimizer.zero_grad(set_to_none=True)
        result = accumulate_gradients(
            self.placed, self.objective, self.batches, totals, seed=0, step=index, total_steps=100, phases=self.phases
        )
        with self.phases("optimizer"):
            self.placed.clip_gradients(1.0)
            self.optimizer.step()
        return result
