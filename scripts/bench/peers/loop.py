"""The layer as it is most easily written: one linear layer after the other, expert by expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.testing.layer_bench import AutogradLayer, LayerCase

PACKAGE = None


class LoopedExperts(nn.Module):
    """A module for each expert, index_add to combine."""

    def __init__(self, case: LayerCase, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.top_k = case.top_k
        self.router = nn.Parameter(inputs["router"].clone())
        self.gate, self.up, self.down = (nn.ParameterList(w.clone() for w in inputs[name]) for name in ("gate", "up", "down"))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = F.linear(x, self.router).softmax(1, dtype=torch.float32).topk(self.top_k, 1)
        weight = (weight / weight.sum(1, keepdim=True)).to(x.dtype)
        y = torch.zeros_like(x)
        for expert, (gate, up, down) in enumerate(zip(self.gate, self.up, self.down, strict=True)):
            token, choice = (chosen == expert).nonzero(as_tuple=True)
            rows = x[token]
            hidden = F.silu(F.linear(rows, gate)) * F.linear(rows, up)
            y.index_add_(0, token, F.linear(hidden, down) * weight[token, choice, None])
        return y

    def gradients(self) -> dict[str, Tensor]:
        """Stacked."""
        stacked = {name: torch.stack([w.grad for w in getattr(self, name)]) for name in ("gate", "up", "down")}
        return {"router": self.router.grad, **stacked}


def build(case: LayerCase, inputs: dict[str, Tensor], variant: str) -> AutogradLayer:
    """No variants."""
    module = LoopedExperts(case, inputs)
    return AutogradLayer(module, inputs["x"], inputs["dy"], module.gradients, low_precision=case.precision == "mixed")
