"""Expert families."""

from moetrain.moe.experts import ffn
from moetrain.moe.experts.base import Experts, ExpertTensor
from moetrain.moe.experts.spawn import SpawnSettings
from moetrain.moe.experts.zero import ZeroExperts, ZeroExpertsConfig

__all__ = ["ExpertTensor", "Experts", "SpawnSettings", "ZeroExperts", "ZeroExpertsConfig", "ffn"]
