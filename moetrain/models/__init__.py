"""Model families."""

from moetrain.models import deepseek_moe, glam

__all__ = ["deepseek_moe", "glam"]
