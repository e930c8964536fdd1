"""Held-out loss of a trained run: ``moetrain evaluate``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from moetrain.config import setting
from moetrain.data import PackedSequences, prepare
from moetrain.errors import DataError
from moetrain.parallel.ranks import Ranks
from moetrain.train.data import BatchPlan
from moetrain.train.restore import restore
from moetrain.train.step import evaluate_loss


@dataclass(kw_only=True)
class EvaluateSettings:
    """What to evaluate."""

    run: str = setting(doc="run folder or checkpoint")
    top_k: int | None = setting(None, doc="experts per token (router.top_k), also another number than in training", ge=1)
    batches: int | None = setting(None, doc="held-out batches of train.global_batch_size sequences; default: all", ge=1)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", doc="auto takes a GPU if there is one")


def main(settings: EvaluateSettings) -> dict[str, Any]:
    """Mean loss (nats per token), perplexity and number of tokens over the held-out data of the run."""
    restored = restore(settings.run, device=settings.device, router={} if settings.top_k is None else {"top_k": settings.top_k})
    config = restored.config
    data = prepare(config.data)
    if data.evaluation.tokens.size < 2:
        raise DataError(f"data.eval_fraction = {config.data.eval_fraction}: the run held out no data to evaluate on")
    sequences = PackedSequences(data.evaluation, seq_len=config.data.seq_len, eos_id=data.eos_id, mask_documents=config.data.mask_documents)
    size = config.train.global_batch_size
    plan = BatchPlan(sequences, config.train.seed, size, config.train.micro_batch_size or size, Ranks())
    limit = settings.batches or math.ceil(len(sequences) / size)
    loss, tokens = evaluate_loss(restored.placed, config.objective.build(), plan.evaluation_batches(limit))
    return {"checkpoint": str(restored.checkpoint), "loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}
