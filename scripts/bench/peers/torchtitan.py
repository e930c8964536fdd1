"""torchtitan's MoE, on several ranks with its all-to-all dispatcher. Its experts always compute in bfloat16.

Variants for float32 masters: as under FSDP with mixed precision, where the layer sees bfloat16 copies of its parameters and
bfloat16 rows (default), or ``float32``: float32 rows and router, and the experts cast for themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher

from moetrain.testing.layer_bench import AutogradLayer, LayerCase, Unsupported

PACKAGE = "torchtitan"


class Block(nn.Module):
    """Tokens as one sequence."""

    def __init__(self, case: LayerCase, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        ranks = case.experts // len(inputs["gate"])
        experts = GroupedExperts.Config(dim=case.hidden, hidden_dim=case.width, num_experts=len(inputs["gate"]))
        dispatcher = (LocalTokenDispatcher if ranks == 1 else AllToAllTokenDispatcher).Config(num_experts=case.experts, top_k=case.top_k)
        config = MoE.Config(
            num_experts=case.experts,
            routed_experts=RoutedExperts.Config(inner_experts=experts, token_dispatcher=dispatcher),
            router=TokenChoiceTopKRouter.Config(
                num_experts=case.experts,
                gate=Linear.Config(in_features=case.hidden, out_features=case.experts),
                top_k=case.top_k,
                score_func="softmax",
                route_norm=True,
            ),
            load_balance_coeff=None,
        )
        with inputs["x"].device:
            self.moe = config.build().to(case.weight_dtype)
        self.moe.tokens_per_expert_E.zero_()
        if ranks > 1:
            set_spmd_backend("default")  # the other one, its default, needs the meshes of a whole model
            mesh = init_device_mesh(inputs["x"].device.type, (ranks,), mesh_dim_names=("ep",))
            self.moe.routed_experts.token_dispatcher.wire_meshes(ep_mesh=mesh)
        with torch.no_grad():
            self.moe.router.gate.weight.copy_(inputs["router"])
            self.experts.w1_EFD.copy_(inputs["gate"])
            self.experts.w3_EFD.copy_(inputs["up"])
            self.experts.w2_EDF.copy_(inputs["down"])

    @property
    def experts(self) -> GroupedExperts:
        """Stacked weights."""
        return self.moe.routed_experts.inner_experts

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x[None])[0]

    def gradients(self) -> dict[str, Tensor]:
        """Of the parameters."""
        experts = self.experts
        return {
            "router": self.moe.router.gate.weight.grad,
            "gate": experts.w1_EFD.grad,
            "up": experts.w3_EFD.grad,
            "down": experts.w2_EDF.grad,
        }


def build(case: LayerCase, inputs: dict[str, Tensor], variant: str) -> AutogradLayer:
    """variant: empty or ``float32``."""
    if case.precision == "float32":
        raise Unsupported("computes in bfloat16")
    if variant and case.precision == "bfloat16":
        raise Unsupported("a variant for float32 masters")
    module = Block(case, inputs)
    x, dy = (inputs[name].float() if variant else inputs[name] for name in ("x", "dy"))
    return AutogradLayer(module, x, dy, module.gradients, low_precision=case.precision == "mixed" and not variant)
