"""Megatron-Core's MoELayer with its own linear layers, experts one after the other. Variants: dispatcher alltoall (default), allgather."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.testing.layer_bench import AutogradLayer, LayerCase

PACKAGE = "megatron-core"


class NoStream:
    """In place of a stream and of its event where everything happens in order."""

    def record_event(self) -> NoStream:
        """Itself."""
        return self

    def synchronize(self) -> None:
        """Nothing is pending."""


def stand_in_for_cuda() -> None:
    """Megatron asks for the GPU and for a stream for copies to the host wherever it runs; on a CPU it gets these."""
    stream = NoStream()
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.Stream = lambda: stream  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda: stream  # type: ignore[assignment, return-value]
    torch.cuda.stream = lambda _: nullcontext()  # type: ignore[assignment, return-value]
    moe_utils.te_general_gemm = None  # 0.16 asks for it without Transformer Engine too

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = on_host  # leaves tensors that are there as they are, which torch's all-to-all refuses


def join_groups(device: torch.device, ranks: int) -> None:
    """All ranks share the experts; the default process group is made here if there is only this one."""
    if parallel_state.model_parallel_is_initialized():
        return
    if device.type == "cpu":
        stand_in_for_cuda()
    if not dist.is_initialized():
        store = dist.FileStore(str(Path(tempfile.mkdtemp()) / "store"), 1)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)


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
            expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
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
        with torch.no_grad():
            self.moe.router.weight.copy_(inputs["router"])
            for expert, gate, up, down in zip(self.experts, inputs["gate"], inputs["up"], inputs["down"], strict=True):
                expert.linear_fc1.weight.copy_(torch.cat([gate, up]))
                expert.linear_fc2.weight.copy_(down)

    @property
    def experts(self) -> nn.ModuleList:
        """Of this rank."""
        return self.moe.experts.local_experts

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x[:, None])[0][:, 0]

    def gradients(self) -> dict[str, Tensor]:
        """Stacked."""
        gate, up = torch.stack([expert.linear_fc1.weight.grad for expert in self.experts]).chunk(2, dim=1)
        down = torch.stack([expert.linear_fc2.weight.grad for expert in self.experts])
        return {"router": self.moe.router.weight.grad, "gate": gate, "up": up, "down": down}


def build(case: LayerCase, inputs: dict[str, Tensor], variant: str) -> AutogradLayer:
    """variant: a ``moe_token_dispatcher_type``."""
    join_groups(inputs["x"].device, case.experts // len(inputs["gate"]))
    module = Block(case, inputs, variant or "alltoall")
    return AutogradLayer(module, inputs["x"], inputs["dy"], module.gradients, low_precision=case.precision == "mixed")
