"""Expert families."""

from moetrain.moe.experts import ffn
from moetrain.moe.experts.base import Experts, ExpertTensor

__all__ = ["ExpertTensor", "Experts", "ffn"]
