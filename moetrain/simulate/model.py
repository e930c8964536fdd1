"""What a simulation needs to know of a model: sizes of its MoE layers and of everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from moetrain.models.common.decoder import Decoder
from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoELayer


@dataclass(frozen=True)
class LayerSizes:
    """One MoE layer. mixer_parameters: of the matrices between the layer's prefetch and its dispatch."""

    experts: Experts
    mixer_parameters: int


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model. dtype: of activations and of copies of experts. parameter_bytes: of one parameter where it is
    owned, its gradient and each of its moments alike. root, blocks: parameters outside of experts, by FSDP unit."""

    layers: tuple[LayerSizes, ...]
    hidden_size: int
    dtype: torch.dtype
    parameter_bytes: int
    root: int
    blocks: tuple[int, ...]

    @classmethod
    def of(cls, model: Decoder) -> ModelSizes:
        """Sizes of a model that was built on the meta device and not sharded."""
        layers, blocks = [], []
        for block in model.layers:
            size = sum(p.numel() for p in block.parameters())
            if isinstance(block.ffn, MoELayer):
                mixer = cast(nn.Module, block.attn)
                layers.append(LayerSizes(block.ffn.experts, sum(p.numel() for p in mixer.parameters())))
                size -= sum(p.numel() for p in block.ffn.experts.parameters())
            blocks.append(size)
        inside = sum(p.numel() for p in model.layers.parameters())
        return cls(
            layers=tuple(layers),
            hidden_size=model.embed.shape[1],
            dtype=model.compute_dtype,
            parameter_bytes=model.embed.element_size(),
            root=sum(p.numel() for p in model.parameters()) - inside,
            blocks=tuple(blocks),
        )

    @property
    def num_experts(self) -> int:
        """Experts of a MoE layer; the same in all of them."""
        return self.layers[0].experts.num_experts

    @property
    def expert_parameters(self) -> list[int]:
        """Parameters of one expert, by MoE layer."""
        return [sum(p.numel() for p in layer.experts.parameters()) // layer.experts.num_experts for layer in self.layers]
