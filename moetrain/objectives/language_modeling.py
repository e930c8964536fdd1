"""Next-token prediction."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from moetrain.config import Component, setting
from moetrain.models.common.decoder import Decoder, Output
from moetrain.models.common.vocabulary import Vocabulary
from moetrain.moe.context import ForwardContext
from moetrain.objectives.batch import IGNORE, Batch
from moetrain.registry import register


@dataclass
class ObjectiveTerms:
    """Sums over the valid tokens of a micro-batch, with gradient. The trainer divides by the tokens of the whole step.

    main: what is reported as ``loss``. extra: further terms by name, already weighted; they count in ``loss_total`` with the
    same factor as main, so that main may carry their gradient.
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
        z_weight = self.config.output_z_loss if ctx.training else 0.0
        nll, z = model(batch.tokens, ctx, document=batch.document, output=likelihood(batch.targets, z_weight))
        return ObjectiveTerms(nll, {"output_z_loss": z} if z_weight else {})


def likelihood(targets: Tensor, z_weight: float = 0.0) -> Output:
    """Output of a decoder: negative log-likelihood of the targets [B, S], and z-loss, as :meth:`Vocabulary.cross_entropy`."""

    def output(hidden: Tensor, rows: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
        return vocabulary.cross_entropy(hidden, rows, targets.flatten(), ignore=IGNORE, z_weight=z_weight)

    return output
