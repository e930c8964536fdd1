import pytest
import torch

from moetrain.models.deepseek_moe import DeepSeekMoEConfig
from moetrain.moe.capacity.policies import DroplessConfig
from moetrain.moe.experts.ffn import FFNExpertsConfig
from moetrain.moe.layer import MoEParts
from moetrain.moe.routers.topk import TopKRouterConfig
from moetrain.parallel.placement.plan import Cluster
from moetrain.simulate.model import ModelSizes


@pytest.fixture
def model():
    """A model of three blocks, the last two with 8 experts, on the meta device."""
    config = DeepSeekMoEConfig(
        hidden_size=16, num_layers=3, num_heads=2, head_dim=8, num_experts=8, top_k=2, expert_width=8, shared_width=8, dense_width=32
    )
    parts = MoEParts(router=TopKRouterConfig(top_k=2), experts=FFNExpertsConfig(num_experts=8, width=8), capacity=DroplessConfig())
    with torch.device("meta"):
        return config.build(parts, vocab_size=50, dtype=torch.bfloat16)


@pytest.fixture
def sizes(model):
    return ModelSizes.of(model)


@pytest.fixture
def cluster():
    return Cluster.even(2, 2, intra_bandwidth=1e9, inter_bandwidth=1e8, latency=1e-5, flops=1e10)
