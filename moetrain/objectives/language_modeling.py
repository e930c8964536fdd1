"""Next-token prediction."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moetrain.config import Component, setting
from moetrain.models.common.decoder import Decoder
from moetrain.moe.context import ForwardContext
from moetrain.objectives.batch import IGNORE, Batch
from moetrain.registry import register


@dataclass
class ObjectiveTerms:
    """Sums over the valid tokens of a micro-batch, with gradient. The trainer divides by the tokens of the whole step.

    main: what is reported as ``loss``. extra: further terms by name, already weighted; they count in ``loss_total``.
    """

    main: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)


@register("objective", "language_modeling")
@dataclass(kw_only=True)
class LanguageModelingConfig(Component):
    """Cross-entropy of the next token."""

    output_z_loss: float = setting(0.0, doc="weight of the mean squared log-partition of the logits (praxis' GLaM 1e-4)", ge=0)

    def build(self) -> LanguageModeling:
        return LanguageModeling(self)


class LanguageModeling:
    """objective(model, batch, ctx) -> sums of negative log-likelihood in nats."""

    def __init__(self, config: LanguageModelingConfig) -> None:
        self.config = config

    def __call__(self, model: Decoder, batch: Batch, ctx: ForwardContext) -> ObjectiveTerms:
        logits = model(batch.tokens, ctx, document=batch.document).flatten(0, 1)
        targets = batch.targets.flatten()
        terms = ObjectiveTerms(model.vocabulary.negative_log_likelihood(logits, targets, ignore=IGNORE))
        if self.config.output_z_loss and ctx.training:
            squared = model.vocabulary.log_partition(logits).square()
            terms.extra["output_z_loss"] = self.config.output_z_loss * torch.where(targets != IGNORE, squared, 0.0).sum()
        return terms
