"""Megatron-Core's MoELayer with its own linear layers, experts one after the other. Variants: dispatcher alltoall (default), allgather."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.testing.layer_bench import AutogradLayer, LayerCase

PACKAGE = "megatron-core"


def join_groups(device: torch.device) -> None:
    """The process groups of one rank."""
    if not dist.is_initialized():
        store = dist.FileStore(str(Path(tempfile.mkdtemp()) / "store"), 1)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()


class Block(nn.Module):
    """Tokens as one sequence."""

    def __init__(self, case: LayerCase, inputs: dict[str, Tensor], dispatcher: str) -> None:
        super().__init__()
        device = inputs["x"].device
        config = TransformerConfig(
            num_layers=1,
            num_attention_heads=1,
            hidden_size=case.hidden,
            ffn_hidden_size=case.width,
            num_moe_experts=case.experts,
            moe_ffn_hidden_size=case.width,
            moe_router_topk=case.top_k,
            moe_router_load_balancing_type="none",
            moe_aux_loss_coeff=0.0,
            moe_router_dtype="fp32",
            moe_token_dispatcher_type=dispatcher,
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            use_cpu_initialization=device.type == "cpu",
            perform_initialization=False,
            params_dtype=case.weight_dtype,
            bf16=case.precision == "bfloat16",
        )
        self.moe = build_module(get_moe_module_spec(use_te=False, num_experts=case.experts), config).to(device, case.weight_dtype)
        self.moe.set_layer_number(1)
        self.experts = self.moe.experts.local_experts
        with torch.no_grad():
            self.moe.router.weight.copy_(inputs["router"])
            for expert, gate, up, down in zip(self.experts, inputs["gate"], inputs["up"], inputs["down"], strict=True):
                expert.linear_fc1.weight.copy_(torch.cat([gate, up]))
                expert.linear_fc2.weight.copy_(down)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x[:, None])[0][:, 0]

    def gradients(self) -> dict[str, Tensor]:
        """Stacked."""
        gate, up = torch.stack([expert.linear_fc1.weight.grad for expert in self.experts]).chunk(2, dim=1)
        down = torch.stack([expert.linear_fc2.weight.grad for expert in self.experts])
        return {"router": self.moe.router.weight.grad, "gate": gate, "up": up, "down": down}


def build(case: LayerCase, inputs: dict[str, Tensor], variant: str) -> AutogradLayer:
    """variant: a ``moe_token_dispatcher_type``."""
    join_groups(inputs["x"].device)
    module = Block(case, inputs, variant or "alltoall")
    return AutogradLayer(module, inputs["x"], inputs["dy"], module.gradients, low_precision=case.precision == "mixed")
