"""SonicMoE's MoE, Hopper GPUs only. Its first weight has gate and up rows in turn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.testing.layer_bench import AutogradLayer, LayerCase, Unsupported

PACKAGE = "sonic-moe"


class Block(nn.Module):
    """Output only: its balance loss gets no gradient."""

    def __init__(self, case: LayerCase, inputs: dict[str, Tensor]) -> None:
        from sonicmoe import MoE
        from sonicmoe.enums import ActivationType

        super().__init__()
        self.moe = MoE(
            num_experts=case.experts,
            num_experts_per_tok=case.top_k,
            hidden_size=case.hidden,
            intermediate_size=case.width,
            activation_function=ActivationType.SWIGLU,
            add_bias=False,
            std=0.02,
        ).to(inputs["x"].device, case.weight_dtype)
        with torch.no_grad():
            self.moe.router.weight.copy_(inputs["router"])
            self.moe.c_fc.weight.copy_(torch.stack([inputs["gate"], inputs["up"]], dim=2).flatten(1, 2))
            self.moe.c_proj.weight.copy_(inputs["down"])

    def forward(self, x: Tensor) -> Tensor:
        from sonicmoe import KernelBackendMoE

        return self.moe(x, kernel_backend_moe=KernelBackendMoE.sonicmoe)[0]

    def gradients(self) -> dict[str, Tensor]:
        """Of the parameters."""
        gate, up = self.moe.c_fc.weight.grad.unflatten(1, (-1, 2)).unbind(2)
        return {"router": self.moe.router.weight.grad, "gate": gate, "up": up, "down": self.moe.c_proj.weight.grad}


def build(case: LayerCase, inputs: dict[str, Tensor], variant: str) -> AutogradLayer:
    """No variants."""
    if not inputs["x"].is_cuda:
        raise Unsupported("needs CUDA")
    if case.precision == "float32":
        raise Unsupported("computes in half precision")
    module = Block(case, inputs)
    return AutogradLayer(module, inputs["x"], inputs["dy"], module.gradients, low_precision=case.precision == "mixed")
