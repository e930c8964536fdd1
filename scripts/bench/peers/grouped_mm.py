"""The usual layer on torch's grouped product: sort, gather, three grouped products, index_add."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.testing.layer_bench import AutogradLayer, LayerCase

PACKAGE = None


class GroupedExperts(nn.Module):
    """Stacked weights."""

    def __init__(self, case: LayerCase, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.top_k, self.num_experts = case.top_k, case.experts
        self.router, self.gate, self.up, self.down = (nn.Parameter(inputs[name].clone()) for name in ("router", "gate", "up", "down"))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = F.linear(x, self.router).softmax(1, dtype=torch.float32).topk(self.top_k, 1)
        weight = (weight / weight.sum(1, keepdim=True)).to(x.dtype)
        chosen, order = chosen.flatten().sort(stable=True)
        token = order // self.top_k
        ends = torch.bincount(chosen, minlength=self.num_experts).cumsum(0).to(torch.int32)
        rows = x[token]
        gate, up = (F.grouped_mm(rows, w.transpose(1, 2), offs=ends) for w in (self.gate, self.up))
        out = F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        return torch.zeros_like(x).index_add(0, token, out * weight.flatten()[order, None])

    def gradients(self) -> dict[str, Tensor]:
        """Of the parameters."""
        return {name: parameter.grad for name, parameter in self.named_parameters()}


def build(case: LayerCase, inputs: dict[str, Tensor], variant: str) -> AutogradLayer:
    """No variants."""
    module = GroupedExperts(case, inputs)
    return AutogradLayer(module, inputs["x"], inputs["dy"], module.gradients, low_precision=case.precision == "mixed")
