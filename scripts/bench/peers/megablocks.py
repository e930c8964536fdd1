"""MegaBlocks' dropless MoE. Variants: its ``mlp_impl``, grouped (default) or sparse. CUDA only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.testing.layer_bench import AutogradLayer, LayerCase, Unsupported

PACKAGE = "megablocks"


class Block(nn.Module):
    """Weights are stored as rows of all experts, w2 transposed."""

    def __init__(self, case: LayerCase, inputs: dict[str, Tensor], implementation: str) -> None:
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import dMoE

        super().__init__()
        arguments = Arguments(
            hidden_size=case.hidden,
            ffn_hidden_size=case.width,
            bias=False,
            return_bias=False,
            activation_fn=F.silu,
            moe_num_experts=case.experts,
            moe_top_k=case.top_k,
            moe_normalize_expert_weights=1,
            moe_loss_weight=0.0,
            mlp_type="glu",
            mlp_impl=implementation,
            fp16=False,
            bf16=case.weight_dtype == torch.bfloat16,
            device=inputs["x"].device,
        )
        self.moe = dMoE(arguments)
        self.num_experts = case.experts
        mlp = self.moe.experts.mlp
        with torch.no_grad():
            self.moe.router.layer.weight.copy_(inputs["router"])
            mlp.w1.copy_(inputs["gate"].flatten(0, 1))
            mlp.v1.copy_(inputs["up"].flatten(0, 1))
            mlp.w2.copy_(inputs["down"].transpose(1, 2).flatten(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x[None])[0]

    def gradients(self) -> dict[str, Tensor]:
        """By expert."""
        mlp = self.moe.experts.mlp
        gate, up, down = (parameter.grad.unflatten(0, (self.num_experts, -1)) for parameter in (mlp.w1, mlp.v1, mlp.w2))
        return {"router": self.moe.router.layer.weight.grad, "gate": gate, "up": up, "down": down.transpose(1, 2)}


def build(case: LayerCase, inputs: dict[str, Tensor], variant: str) -> AutogradLayer:
    """variant: ``mlp_impl``."""
    if not inputs["x"].is_cuda:
        raise Unsupported("needs CUDA")
    module = Block(case, inputs, variant or "grouped")
    return AutogradLayer(module, inputs["x"], inputs["dy"], module.gradients, low_precision=case.precision == "mixed")
