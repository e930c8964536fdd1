"""DeepSpeed's MoE without dropping: every expert gets as many rows as the busiest one."""

from __future__ import annotations

import os

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.testing.layer_bench import AutogradLayer, LayerCase

PACKAGE = "deepspeed"


class SwiGLU(nn.Module):
    """One expert."""

    def __init__(self, case: LayerCase) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(case.hidden, case.width, bias=False) for _ in range(2))
        self.down = nn.Linear(case.width, case.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Output only."""

    def __init__(self, case: LayerCase, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        ranks = case.experts // len(inputs["gate"])
        moe = MoE(
            case.hidden,
            SwiGLU(case),
            case.experts,
            ep_size=ranks,
            k=case.top_k,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        moe.set_deepspeed_parallelism()
        self.moe = moe.to(inputs["x"].device, case.weight_dtype)
        with torch.no_grad():
            self.router.weight.copy_(inputs["router"])
            for name in ("gate", "up", "down"):
                for expert, weight in zip(self.experts, inputs[name], strict=True):
                    getattr(expert, name).weight.copy_(weight)

    @property
    def router(self) -> nn.Linear:
        """Its weights are [E, D]."""
        return self.moe.deepspeed_moe.gate.wg

    @property
    def experts(self) -> nn.ModuleList:
        """Of this rank."""
        return self.moe.deepspeed_moe.experts.deepspeed_experts

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)[0]

    def gradients(self) -> dict[str, Tensor]:
        """Stacked."""
        stacked = {name: torch.stack([getattr(e, name).weight.grad for e in self.experts]) for name in ("gate", "up", "down")}
        return {"router": self.router.weight.grad, **stacked}


def join_group(device: torch.device) -> None:
    """DeepSpeed's process group, of one rank if the environment has no more."""
    if not deepspeed.comm.is_initialized():
        alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.update({**alone, **os.environ})
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)


def build(case: LayerCase, inputs: dict[str, Tensor], variant: str) -> AutogradLayer:
    """No variants."""
    join_group(inputs["x"].device)
    module = Block(case, inputs)
    return AutogradLayer(module, inputs["x"], inputs["dy"], module.gradients, low_precision=case.precision == "mixed")
