"""DeepSeekMoE."""

from moetrain.models.deepseek_moe.config import DeepSeekMoEConfig

__all__ = ["DeepSeekMoEConfig"]
