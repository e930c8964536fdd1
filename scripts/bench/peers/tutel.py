"""Tutel's moe_layer with its Llama-like experts and a capacity that drops nothing: that of the busiest expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tutel import moe as tutel_moe
from tutel import system

from moetrain.testing.layer_bench import AutogradLayer, LayerCase

PACKAGE = "tutel"
JOINS_BY_ITSELF = True


class Block(nn.Module):
    """Weights are kept flat."""

    def __init__(self, case: LayerCase, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.moe = tutel_moe.moe_layer(
            gate_type={"type": "top", "k": case.top_k, "capacity_factor": 0},
            model_dim=case.hidden,
            experts={
                "type": "llama_ffn",
                "num_experts_per_device": len(inputs["gate"]),
                "hidden_size_per_expert": case.width,
            },
        ).to(inputs["x"].device, case.weight_dtype)
        self.shape = (len(inputs["gate"]), case.hidden, case.width)
        experts = self.moe.experts
        self.weights = {"gate": experts.W_fc1, "up": experts.W_fc2, "down": experts.W_fc3}
        with torch.no_grad():
            self.moe.gates[0].wg.weight.copy_(inputs["router"])
            for name, parameter in self.weights.items():
                parameter.copy_(inputs[name].transpose(1, 2).reshape(parameter.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)

    def gradients(self) -> dict[str, Tensor]:
        """Transposed to [out, in]."""
        experts, hidden, width = self.shape
        shapes = {"gate": (experts, hidden, width), "up": (experts, hidden, width), "down": (experts, width, hidden)}
        turned = {name: parameter.grad.view(shapes[name]).transpose(1, 2) for name, parameter in self.weights.items()}
        return {"router": self.moe.gates[0].wg.weight.grad, **turned}


def build(case: LayerCase, inputs: dict[str, Tensor], variant: str) -> AutogradLayer:
    """No variants."""
    system.init_data_model_parallel(backend="nccl" if inputs["x"].is_cuda else "gloo")
    module = Block(case, inputs)
    return AutogradLayer(module, inputs["x"], inputs["dy"], module.gradients, low_precision=case.precision == "mixed")
