"""Next-token prediction by two stochastic passes that have to agree (THOR, 2110.04260; without random experts, R-Drop)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.config import Component, setting
from moetrain.models.common.decoder import Decoder
from moetrain.models.common.vocabulary import Vocabulary
from moetrain.moe.context import ForwardContext
from moetrain.objectives.batch import IGNORE, Batch
from moetrain.objectives.language_modeling import ObjectiveTerms, likelihood
from moetrain.registry import register


@register("objective", "consistency", source="THOR 2110.04260")
@dataclass(kw_only=True)
class ConsistencyConfig(Component):
    """CE(p1) + CE(p2) + alpha * symmetric KL of p1 and p2, from two passes that draw different noise.

    Reported as loss: CE(p1), comparable with other runs. Evaluation makes one pass.
    """

    alpha: float = setting(5.0, doc="weight of the symmetric KL per token; THOR 5, its code's default 1", ge=0)

    def build(self) -> Consistency:
        return Consistency(self)


class Consistency:
    """objective(model, batch, ctx) -> sums in nats. Both passes are one forward over the batch and its copy."""

    def __init__(self, config: ConsistencyConfig) -> None:
        self.alpha = config.alpha

    def __call__(self, model: Decoder, batch: Batch, ctx: ForwardContext) -> ObjectiveTerms:
        targets = batch.targets.flatten()
        if not ctx.training:
            return ObjectiveTerms(model(batch.tokens, ctx, document=batch.document, output=likelihood(batch.targets))[0])
        document = None if batch.document is None else batch.document.repeat(2, 1)
        logits = model(batch.tokens.repeat(2, 1), ctx.repeated(2), document=document).flatten(0, 1)
        first, second = logits.chunk(2)
        nll = [model.vocabulary.negative_log_likelihood(half, targets, ignore=IGNORE) for half in (first, second)]
        divergence = torch.where(targets != IGNORE, symmetric_divergence(first, second, model.vocabulary), 0.0).sum()
        return ObjectiveTerms(nll[0], {"second_pass": nll[1], "consistency": self.alpha * divergence})


def symmetric_divergence(first: Tensor, second: Tensor, vocabulary: Vocabulary) -> Tensor:
    """[T] (KL(p1 || p2) + KL(p2 || p1)) / 2 in nats, from logits [T, V] in at least float32."""
    log_p, log_q = (logits - vocabulary.log_partition(logits)[:, None] for logits in (first, second))
    return vocabulary.sum((log_p.exp() - log_q.exp()) * (log_p - log_q)) / 2
