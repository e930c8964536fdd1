"""transformers' Mixtral block. Variants: its implementation of the experts, grouped_mm (the default here) or eager."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from moetrain.testing.layer_bench import AutogradLayer, LayerCase

PACKAGE = "transformers"


class Block(nn.Module):
    """Tokens as one sequence."""

    def __init__(self, case: LayerCase, inputs: dict[str, Tensor], implementation: str) -> None:
        super().__init__()
        config = MixtralConfig(
            hidden_size=case.hidden,
            intermediate_size=case.width,
            num_local_experts=case.experts,
            num_experts_per_tok=case.top_k,
            experts_implementation=implementation,
        )
        with inputs["x"].device:
            self.block = MixtralSparseMoeBlock(config).to(case.weight_dtype)
        with torch.no_grad():
            self.block.gate.weight.copy_(inputs["router"])
            self.block.experts.gate_up_proj.copy_(torch.cat([inputs["gate"], inputs["up"]], dim=1))
            self.block.experts.down_proj.copy_(inputs["down"])

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x[None])[0]

    def gradients(self) -> dict[str, Tensor]:
        """Of the parameters."""
        gate, up = self.block.experts.gate_up_proj.grad.chunk(2, dim=1)
        return {"router": self.block.gate.weight.grad, "gate": gate, "up": up, "down": self.block.experts.down_proj.grad}


def build(case: LayerCase, inputs: dict[str, Tensor], variant: str) -> AutogradLayer:
    """variant: an ``experts_implementation``."""
    module = Block(case, inputs, variant or "grouped_mm")
    return AutogradLayer(module, inputs["x"], inputs["dy"], module.gradients, low_precision=case.precision == "mixed")
