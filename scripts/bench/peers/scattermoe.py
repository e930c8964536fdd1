"""ScatterMoE's gated MLP behind a torch router. CUDA only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.testing.layer_bench import AutogradLayer, LayerCase, Unsupported

PACKAGE = "scattermoe"


class Block(nn.Module):
    """Its first product gives up above gate."""

    def __init__(self, case: LayerCase, inputs: dict[str, Tensor]) -> None:
        from scattermoe.mlp import GLUMLP

        super().__init__()
        self.top_k = case.top_k
        self.router = nn.Parameter(inputs["router"].clone())
        self.mlp = GLUMLP(case.hidden, case.width, case.experts, case.top_k).to(inputs["x"].device, case.weight_dtype)
        with torch.no_grad():
            self.mlp.experts.weight.copy_(torch.cat([inputs["up"], inputs["gate"]], dim=1))
            self.mlp.output_experts.weight.copy_(inputs["down"])

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = F.linear(x, self.router).softmax(1, dtype=torch.float32).topk(self.top_k, 1)
        return self.mlp(x, (weight / weight.sum(1, keepdim=True)).to(x.dtype), chosen)

    def gradients(self) -> dict[str, Tensor]:
        """Of the parameters."""
        up, gate = self.mlp.experts.weight.grad.chunk(2, dim=1)
        return {"router": self.router.grad, "gate": gate, "up": up, "down": self.mlp.output_experts.weight.grad}


def build(case: LayerCase, inputs: dict[str, Tensor], variant: str) -> AutogradLayer:
    """No variants."""
    if not inputs["x"].is_cuda:
        raise Unsupported("needs CUDA")
    module = Block(case, inputs)
    return AutogradLayer(module, inputs["x"], inputs["dy"], module.gradients, low_precision=case.precision == "mixed")
